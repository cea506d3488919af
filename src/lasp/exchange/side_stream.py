"""An exchange on a stream of its own, beside the local work that is queued meanwhile.

NCCL's collectives have streams of their own anyway; this is for what an exchange computes between them. A rank of a
chain receives, folds and sends on: on the compute stream its message would wait behind all local work queued before.
On a CPU there are no streams, and the exchange runs where it is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lasp.distributed.comm import Comm

_streams: dict[torch.device, torch.cuda.Stream] = {}


class SideStream:
    """Orders the streams around one exchange: `begun` around its start, `ended` around the wait for it.

    Work queued in between runs beside it. Everything an exchange reads must stay referenced until it has ended.
    """

    def __init__(self, device: torch.device, comm: Comm) -> None:
        self._device, self._comm, clock = device, comm, comm.clock
        # On the host's clock the messages themselves count; on the device's only what holds up the compute stream.
        self._clock = clock if clock is not None and clock.on_device else None
        if device.type == "cuda" and device not in _streams:
            # What it launches is short, and others wait for it.
            _streams[device] = torch.cuda.Stream(device, priority=-1)
        self._stream = _streams.get(device)

    @contextmanager
    def begun(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        if self._clock is not None:
            self._clock.begun()

    @contextmanager
    def ended(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._comm.wait_for_sends()
        if self._clock is not None:
            self._clock.wait_begins()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if self._clock is not None:
            self._clock.wait_ends(1)

    def hand_over(self, tensor: Tensor | None) -> None:
        """What the exchange allocated is now the compute stream's: its memory is not reused before that is done."""
        if self._stream is not None and tensor is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))
