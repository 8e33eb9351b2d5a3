"""Accuracy and cost of methods on the same questions."""
