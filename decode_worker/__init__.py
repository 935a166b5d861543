"""The decode worker: owns a request from its admission to its last token."""
