"""What both kinds of worker share around the engine: its thread, its publications, its registration, its KV source."""
