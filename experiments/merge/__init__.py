"""``tokenprune merge``: several runs of the same questions as one."""
