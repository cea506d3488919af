"""Headers of messages by kernels and by PyTorch: the same bits, the same NaN, the same words for the host."""

from __future__ import annotations

import pytest
import torch

from lasp.distributed.sealed import HEADER_BYTES, WORDS, TorchStamps
from lasp.kernels.triton.messages.stamps import BLOCK, TritonStamps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
@pytest.mark.parametrize("count", [0, 5, BLOCK + 3])
def test_kernels_equal_pytorch(dtype, count, device):
    found = {}
    payload = torch.arange(count).to(dtype).to(device)
    length = (HEADER_BYTES + -(-count * dtype.itemsize // 8) * 8) // dtype.itemsize
    head = HEADER_BYTES // dtype.itemsize
    for stamps in (TritonStamps(), TorchStamps()):
        state, told = torch.tensor([6, 40], device=device), torch.zeros(2 * WORDS, dtype=torch.int64)
        told = told.pin_memory() if device.type == "cuda" else told
        forward = stamps.begin(state, None, -(2**62) - 1)
        header = stamps.begin(state, forward, 2**62 + 1)
        rows = torch.stack([stamps.seal(each, payload, length) for each in (header, header, forward)])
        stamps.open(header, rows[:2], told)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert not told.any() and torch.equal(rows[0, head : head + count], payload)
        stamps.open(header, rows, told)
        if device.type == "cuda":
            torch.cuda.synchronize()
        last = rows[2, head : head + count]
        assert last.isnan().all() if dtype.is_floating_point else torch.equal(last, payload)
        assert torch.equal(rows[:2, head : head + count], payload.expand(2, -1)), "only what another call sent"
        found[type(stamps)] = state.tolist(), header.tolist(), told.tolist()
    kernels, pytorch = found.values()
    assert kernels == pytorch == ([8, 40], [8, 7, 2**62 + 1, 40], [8, 7, 2**62 + 1, 40, 7, 0, -(2**62) - 1, 40])
