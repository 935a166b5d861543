"""Speculative decoding: several tokens a step where they can be guessed."""
