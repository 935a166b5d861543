"""What the router believes of the workers' caches."""
