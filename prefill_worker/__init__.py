"""The prefill worker: computes the KV of prompts and pushes it to decode workers. It never samples."""
