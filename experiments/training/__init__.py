"""Training of the embedded testbeds."""
