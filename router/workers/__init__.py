"""What the router knows of the workers: who is there, their load, and a snapshot of it for plans."""
