"""Structured output: grammars and their token masks (XGrammar: Dong et al., arXiv:2411.15100)."""
