"""What tokenprune itself costs, as ratios of things measured in one run.

Seconds belong to a machine; a ratio of two times that were taken one after the other says something
about the code.  Each module measures one thing and returns `Figure` rows; `record` runs them.
"""
