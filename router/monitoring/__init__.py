"""What a router tells of itself and its fleet to those who watch it; beside the way of a request."""
