"""Figures of what methods keep."""
