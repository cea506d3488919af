"""The backends of every recurrence's stages, and their selection."""
