"""An operator that has begun and waits for its queries."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class PendingOutputs:
    """A call whose queries come later, begun by `linear_attention_begin` and the like. Finish it once."""

    def __init__(self, finish: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> None:
        self._finish = finish

    def finish(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs [B, T, H_v, V], and the final state or None.

        Args:
            q: [B, T, H, K], of k's shape, dtype and device.

        Raises:
            ValueError: q does not fit.
            ExchangeError: the ranks disagree, or one does not answer in time.
        """
        return self._finish(q)
