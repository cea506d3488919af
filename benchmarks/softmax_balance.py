"""Measures how evenly causal softmax attention is spread over ranks: each rank's share of the scores, one by one.

    python benchmarks/softmax_balance.py          (a GPU; about 30 seconds)

For every number of ranks, the local attention that each rank of `lasp.softmax_attention` computes, forward and
backward, without the exchanges: with "all_gather" one time a rank, with "ulysses" the same for all. The step waits for
the slowest.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

from lasp.softmax.blocks import blocks_of
from lasp.softmax.local import attend
from lasp.softmax.scores import ScoreOptions


def milliseconds(tokens: int, first: int, last: int, keys: int, heads: tuple[int, int], dim: int, repeat: int) -> Any:
    """Median and spread of attention from queries first .. last - 1 to `keys` keys, and its peak memory in MiB."""
    q, k, v = (
        torch.randn(1, t, h, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for t, h in ((last - first, heads[0]), (keys, heads[1]), (keys, heads[1]))
    )
    gradient, blocks = torch.randn_like(q), blocks_of((0, tokens), (0, 0), first, last, True)

    def step() -> None:
        o = attend(q, k, v, None, blocks, ScoreOptions(True, dim**-0.5), backend="auto")
        torch.autograd.grad(o, (q, k, v), gradient)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times), max(times) - min(times), (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128, help="channels of a head")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}, bf16, forward and backward: {options}")
    print(
        "ranks | all_gather ms, rank 0 .. last | slowest / mean | MiB | ulysses ms | MiB | slowest / ulysses | spread"
    )
    for size in (1, 2, 4, 8):
        share = options.tokens // size

        def timed(first: int, last: int, keys: int, heads: int, key_heads: int) -> Any:
            return milliseconds(options.tokens, first, last, keys, (heads, key_heads), options.dim, options.repeat)

        gathered = [
            timed(rank * share, (rank + 1) * share, (rank + 1) * share, options.heads, options.key_heads)
            for rank in range(size)
        ]
        all_tokens = timed(0, options.tokens, options.tokens, options.heads // size, max(1, options.key_heads // size))
        times = [time for time, _, _ in gathered]
        spread = max(spread for _, spread, _ in (*gathered, all_tokens))
        print(
            f"{size} | {' '.join(f'{time:.1f}' for time in times)} | {max(times) * size / sum(times):.2f} | "
            f"{gathered[-1][2]:.0f} | {all_tokens[0]:.1f} | {all_tokens[2]:.0f} | {max(times) / all_tokens[0]:.2f} | "
            f"{spread:.1f}"
        )


if __name__ == "__main__":
    main()
