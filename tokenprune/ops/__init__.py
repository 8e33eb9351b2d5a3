"""Tensor operations that methods share."""
