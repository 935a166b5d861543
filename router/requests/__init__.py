"""From a client's JSON to work for the cluster: what is asked, checked and tokenised."""
