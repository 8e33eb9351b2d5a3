"""Names with a meaning of their own in tables."""

__all__ = ["OVERALL"]


OVERALL = "overall"
"""The `kind` of a summary row over all questions."""
