"""Reports of a run: on the terminal, in its folder, to trackers and in traces."""
