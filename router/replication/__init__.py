"""Copies of prefixes that are asked for often, made before whoever has them is the one that all wait for."""
