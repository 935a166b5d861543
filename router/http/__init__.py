"""The HTTP server: routes, bodies, limits, errors, server-sent events."""
