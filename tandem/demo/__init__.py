"""The demo model: its corpus, tokenizer, training script, evaluation, and the trained model folder itself."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""The trained model."""

HEAD_PATH = Path(__file__).parent / "head"
"""A draft head for it."""
