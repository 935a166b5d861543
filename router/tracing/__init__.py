"""The router's part of requests' traces; see docs/tracing.md."""
