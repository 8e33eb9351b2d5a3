"""Whether two methods answer different questions correctly."""
