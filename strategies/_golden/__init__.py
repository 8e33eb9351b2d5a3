"""Replays of official vectors, one file a method; found by `tokenprune.testing.golden`, not by users."""
