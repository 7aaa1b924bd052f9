"""Simic: the population engine, rewards, PPO and curricula."""
