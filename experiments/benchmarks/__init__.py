"""What tokenprune itself costs, as ratios of figures that are measured in one run.

Seconds depend on the machine.  The ratio of two times, measured one after the other, depends far
more on the code.  Each module measures one aspect and yields `Figure` rows; `run` collects them.
"""
