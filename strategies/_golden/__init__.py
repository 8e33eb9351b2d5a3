"""Replays of golden vectors, one file per method.  `tokenprune.testing.golden` finds them."""
