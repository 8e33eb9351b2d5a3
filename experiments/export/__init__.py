"""A folder with which a method of a run is served."""
