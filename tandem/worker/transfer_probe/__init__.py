"""Measures, for an operator, how fast KV comes to a worker from another one."""
