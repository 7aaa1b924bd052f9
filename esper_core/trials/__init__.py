"""Trials: the arms of a comparison, static networks, the jobs that train them, and intervals over seeds."""
