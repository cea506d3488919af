"""What a run tells: on the terminal, in its folder, to trackers and in traces."""
