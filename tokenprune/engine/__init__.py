"""Runs a compressor inside an unmodified Hugging Face model.  Start reading in `session`."""
