"""Text on disk -> a token stream -> the tokens of each step, rank and shard."""
