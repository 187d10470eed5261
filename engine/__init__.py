"""What is done with a network: training, evaluation, checkpoints, tracking."""
