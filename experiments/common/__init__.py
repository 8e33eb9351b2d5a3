"""What experiments share.  No module here imports an experiment."""
