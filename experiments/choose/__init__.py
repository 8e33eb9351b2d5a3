"""``tokenprune choose``: the method for a budget."""
