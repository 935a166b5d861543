"""Messages and their codec: what crosses a process boundary."""
