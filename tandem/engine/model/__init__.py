"""Model families, and loading them from checkpoints."""

from tandem.engine.model.loader import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
