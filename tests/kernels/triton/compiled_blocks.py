"""Compiled blocks of a family against the same uncompiled: any documents, any number of tokens, on one process or two.

    python tests/kernels/triton/compiled_blocks.py cpu|cuda FAMILY RANKS

Prints, as JSON, what each rank found at each of STEPS. A script of its own: a process that has looked at a GPU cannot
fork.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
if __name__ == "__main__" and sys.argv[1] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from tolerances import relative_error
from torch import nn
from torch._dynamo.utils import counters
from world import run

import lasp
from lasp.halo import functions as halo
from lasp.layers import fused, mixer
from lasp.models import CausalLM, preset
from lasp.parallelize import parallelize

# Tokens of a process, and where packed documents end, as parts of all tokens; graphs that there are afterwards.
STEPS = (
    (24, (0.1, 0.1, 1.0), 1),
    (24, (0.4, 0.5, 0.6, 1.0), 1),
    (24, None, 2),
    (17, (0.2, 1.0), 3),
    (20, (0.4, 0.7, 0.7, 1.0), 3),
    (17, None, 4),
    (29, None, 4),
)


class Found(NamedTuple):
    """Results of a step.

    Attributes:
        error: of the gradients. control: the same of the eager model's own with other documents; 1 without any.
        graphs: that have been made. sent: bytes, by the compiled model and by the other.
    """

    error: float
    control: float
    graphs: int
    sent: tuple[int, int]


def take_kernels() -> None:
    """Take the kernels, which here may be interpreted, and the compiler's front alone, as its default has it."""
    for module in (halo, fused, mixer):
        module.has_fused_kernels = lambda device, dtype: True  # type: ignore[attr-defined]
    mixer.has_fused_delta_rules = lambda *of: True  # type: ignore[attr-defined]
    torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")


def results(family: str, device: str, sp: lasp.SequenceParallel | None = None) -> list[Found]:
    """Find what there is at each step. `take_kernels` must have been called."""
    torch._dynamo.reset()
    counters.clear()
    sizes: dict[str, Any] = {"layer_pattern": "N"} if family == "hybrid" else {}
    torch.manual_seed(0)
    eager = CausalLM(preset(family, "tiny", vocab_size=50, num_layers=1, backend="triton", **sizes)).to(device)
    compiled = parallelize(copy.deepcopy(eager), None, compile=True).training
    size, rank = (1, 0) if sp is None else (sp.size, sp.rank)

    def gradients(model: nn.Module, text: torch.Tensor, parts: Any) -> tuple[torch.Tensor, int]:
        before = 0 if sp is None else sp.counters.sent_bytes
        model.zero_grad()
        bounds = None if parts is None else [0, *(round(end * text.shape[1] * size) for end in parts)]
        model(text, labels=text, cu_seqlens=bounds, sp=sp).loss_sum.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        return flat, 0 if sp is None else sp.counters.sent_bytes - before

    found = []
    for number, (tokens, parts, _) in enumerate(STEPS):
        text = torch.randint(50, (1, tokens * size), generator=torch.Generator().manual_seed(number)).to(device)
        text = text[:, rank * tokens : (rank + 1) * tokens].contiguous()
        (own, sent), (expected, sent_by_other) = (gradients(model, text, parts) for model in (compiled, eager))
        control = 1.0 if parts is None else relative_error(gradients(eager, text, (0.8, 1.0))[0], expected)
        graphs = int(counters["stats"]["unique_graphs"])
        found.append(Found(relative_error(own, expected), control, graphs, (sent, sent_by_other)))
    assert not counters["graph_break"]
    return found


def main() -> None:
    device, family, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    if device == "cpu":
        import interpreted_fast
        from torch._inductor import pattern_matcher  # noqa: F401  which compiling loads: here once; it looks for GPUs

        interpreted_fast.install()
    take_kernels()

    def work(rank: int) -> list[Found]:
        return results(family, device, lasp.SequenceParallel(dist.group.WORLD, timeout_s=100))

    print(json.dumps(run(ranks, work, deadline_s=300) if ranks > 1 else [results(family, device)]))


if __name__ == "__main__":
    main()
