"""Simic, the gym: the population engine, rewards, PPO and the curriculum."""
