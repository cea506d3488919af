"""The training program: configuration, loop, checkpoints, metrics."""
