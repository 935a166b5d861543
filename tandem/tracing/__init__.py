"""Traces of requests, sent over OTLP/HTTP; imported only where `otlp_endpoint` is set (docs/tracing.md)."""
