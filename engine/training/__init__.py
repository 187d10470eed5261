"""Training a network: the loop, the run around it, the schedule, the optimizer, several processes, tracking."""
