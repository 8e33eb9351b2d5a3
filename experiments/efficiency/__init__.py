"""Cost of methods: estimated analytically, and measured."""
