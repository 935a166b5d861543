"""Text on one side, token ids on the other: tokeniser, templates, detokeniser, stop strings, splicing."""
