"""Growth against the compute frontier: static networks of every size, tuned, at the grown run's FLOPs."""
