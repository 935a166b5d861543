"""Text on one side, token ids on the other: tokeniser, chat template, incremental detokeniser, stop strings, splicing."""
