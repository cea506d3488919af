"""The ranks that share a sequence, and who of them holds which tokens and documents."""

from lasp.sequence.sequence_parallel import SequenceParallel, balanced_lengths

__all__ = ["SequenceParallel", "balanced_lengths"]
