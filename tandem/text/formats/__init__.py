"""How models write tool calls and reasoning into their text, and incremental parsers for it; one file a format.

A new format is one file with a `ToolFormat` or a `ReasoningFormat`, and its entry in `registry`.
"""
