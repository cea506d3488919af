"""The algebra of linear recurrences: transitions, summaries of runs, and the scan over them."""

from lasp.algebra.summary import Summary, compose, scan
from lasp.algebra.transition import Dense, Diagonal, Identity, Scalar, Transition

__all__ = ["Dense", "Diagonal", "Identity", "Scalar", "Summary", "Transition", "compose", "scan"]
