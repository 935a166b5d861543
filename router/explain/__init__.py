"""Why a request went where it went, what came of it, and how much of what could be reused was."""
