"""The operations between matrix products and attention: one interface, one file an implementation."""
