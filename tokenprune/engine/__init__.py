"""Runs a compressor inside an unmodified Hugging Face model.  Start reading in `session`."""

from tokenprune.deprecated import moved_names

__getattr__ = moved_names(__name__)
