"""One file for each command of an experiment: its options, and what it prints.

Files are found by themselves (`tokenprune.cli`).  They import nothing heavy at the top, so that
``tokenprune --help`` stays quick; the work is done by the module of the experiment.
"""
