"""Scripts that check what the tool promises."""
