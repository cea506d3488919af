"""The kernel of the loss over a large vocabulary."""
