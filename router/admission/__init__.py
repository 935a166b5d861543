"""Who may ask, how much, and in which order requests are let in when there are too many."""
