"""Whether a method prefers locations."""
