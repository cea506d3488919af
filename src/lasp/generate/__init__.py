"""Generation with a state of constant size."""

from lasp.generate.generation import Prefilled, decode, generate, prefill, stream
from lasp.generate.sampling import sample

__all__ = ["Prefilled", "decode", "generate", "prefill", "sample", "stream"]
