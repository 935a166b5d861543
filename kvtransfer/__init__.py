"""Moves KV from the worker that has it to the worker that needs it. Imports only `tandem`."""
