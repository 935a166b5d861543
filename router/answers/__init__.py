"""From tokens to a client's JSON: text, tool calls, reasoning, chunks and whole answers."""
