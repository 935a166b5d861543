"""Trains draft heads for speculative decoding: `tandem train-draft`."""
