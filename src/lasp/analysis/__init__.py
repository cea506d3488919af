"""Communication, memory and time of every method in closed form, and a simulator: to know before renting a cluster."""
