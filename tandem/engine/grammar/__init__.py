"""Structured output: grammars compiled aside, and the token masks they give (XGrammar: Dong et al., arXiv:2411.15100).

No module here is imported before the first request with a grammar, except by tests.
"""
