"""Attention backends: one file each, behind the interface in `base`."""
