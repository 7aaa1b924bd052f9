"""A sweep: a grid or a random search of runs, on worker processes here or on a Ray cluster."""
