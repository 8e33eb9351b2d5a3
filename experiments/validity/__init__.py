"""Agreement of a run's ranking of methods with published ones."""
