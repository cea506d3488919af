"""The schedules that carry states over ranks, one a file."""
