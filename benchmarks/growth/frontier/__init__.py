"""Growth against the compute frontier: P8 (GPU), P9 (two cores), P10 (unknown budgets)."""
