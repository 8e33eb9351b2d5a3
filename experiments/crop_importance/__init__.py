"""How much each crop matters for the answer."""
