"""How the options of a method change its accuracy."""
