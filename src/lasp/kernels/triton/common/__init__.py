"""What the kernels of every recurrence share."""
