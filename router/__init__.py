"""The HTTP front door of a cluster: tokenises, decides, dispatches, detokenises and streams. It never imports torch."""
