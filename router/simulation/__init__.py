"""Simulated workers in virtual time behind the real router code: what a policy would have done with a recorded load.

Policies, prefix index, predictions, load accounting and admission are the router's own; workers are models of their
queues, steps, caches and links. Nothing that serves requests imports this.
"""
