"""Replays of official vectors, one file a method; found by `tokenprune.golden`, not by users."""
