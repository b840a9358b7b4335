"""SPIN's own parts: losses, pairs, replay, schedule, reference, equilibrium, guards, rollouts."""
