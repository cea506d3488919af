"""`lasp bench`: what exchanges and training steps take on the processes and devices that are there."""
