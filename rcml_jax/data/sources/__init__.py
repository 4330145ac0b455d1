"""Where data come from: one module a source."""
