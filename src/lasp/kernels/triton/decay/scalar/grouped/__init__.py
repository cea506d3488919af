"""Gradients of q, k and gates per token where many value heads share a head of q and k: sums over those are taken
inside, block by block, of two chunks each, from states at the borders of blocks."""
