"""Published figures of methods."""
