"""Learning: demonstrations, rollouts, PPO, and the curriculum that they draw from."""
