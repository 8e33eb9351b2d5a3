"""What a compression costs."""
