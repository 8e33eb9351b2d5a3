"""Tensor operations that strategies share."""
