"""Tandem: a disaggregated LLM serving cluster with a cache-aware router."""

__version__ = "0.1.0"
