"""The demo model: its corpus, tokenizer, training script, evaluation, and the trained model folder itself."""
