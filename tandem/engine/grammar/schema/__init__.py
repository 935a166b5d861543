"""JSON schemas as XGrammar enforces them: rewritten without what it passes over in silence, or refused."""
