"""Workers on the machines of a Ray cluster, each of which holds one model."""
