"""One tool a module."""
