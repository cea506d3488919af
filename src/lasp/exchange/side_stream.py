"""An exchange on a stream of its own, beside the local work that is queued meanwhile.

NCCL's collectives have streams of their own anyway; this is for what an exchange computes between them. A rank of a
chain receives, folds and sends on: on the compute stream its message would wait behind all local work queued before.
On a CPU there are no streams: there the exchange runs where it is waited for, and has no need of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lasp.distributed.comm import Comm

_streams: dict[torch.device, torch.cuda.Stream] = {}


class SideStream:
    """Orders the streams of a GPU around one exchange: `begun` around its start, `ended` around the wait for it.

    Work queued in between runs beside it. Everything an exchange reads must stay referenced until it has ended.
    """

    def __init__(self, device: torch.device, comm: Comm) -> None:
        self._device, self._comm, clock = device, comm, comm.clock
        # On the host's clock the messages themselves count; on the device's only what holds up the compute stream.
        self._clock = clock if clock is not None and clock.on_device else None
        stream = _streams.get(device)
        if stream is None:
            # What it launches is short, and others wait for it.
            stream = _streams[device] = torch.cuda.Stream(device, priority=-1)
        self._stream = stream

    @contextmanager
    def begun(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        if self._clock is not None:
            self._clock.begun()

    @contextmanager
    def ended(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield
            self._comm.wait_for_sends()
        if self._clock is not None:
            self._clock.wait_begins()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if self._clock is not None:
            self._clock.wait_ends(1)

    def hand_over(self, tensor: Tensor | None) -> None:
        """Give the compute stream what the exchange allocated: its memory is not reused before that is done."""
        if tensor is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))
