"""Whether a method prefers places."""
