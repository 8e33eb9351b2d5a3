"""Runs methods inside lmms-eval, and turns its logs into run folders."""
