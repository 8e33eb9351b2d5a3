"""Replays of official vectors, one file per method; `tokenprune.testing.golden` finds them."""
