"""Two processes, on one GPU where there is one, against one: outputs, final state, every gradient.

    python tests/kernels/triton/two_ranks.py cpu|cuda [--every]

Prints, as JSON, the relative errors on each rank. Compiled are graphs of some kinds of decay, with a final state and
without, of packed documents too; with --every those of every kind. A script of its own: a process that has looked at a
GPU cannot fork.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
torch.set_num_threads(1)
DEVICE = sys.argv[1]
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreted_fast
    import torch._inductor.pattern_matcher  # which compiling loads: here once, and not in every rank; it looks for GPUs

    interpreted_fast.install()

from problems import GATES, Problem, make, solve  # noqa: E402
from tolerances import relative_error  # noqa: E402
from world import run  # noqa: E402

import lasp  # noqa: E402

DIMS = {"batch": 1, "tokens": 70, "heads": 1, "value_heads": 2, "keys": 16, "values": 16}
LENGTHS = (41, 29)
# Kinds of decay that are compiled, with and without a final state.
COMPILED = {True: ("scalar", "channel, packed"), False: ("constant", "channel", "scalar, packed")}
if "--every" in sys.argv:
    COMPILED = dict.fromkeys((True, False), (*GATES, *(f"{gate}, packed" for gate in GATES)))
# Documents on the first rank, without tokens, over the border, and two on the last rank.
BOUNDS = (0, 20, 20, 55, 60, 70)


def leaves_of(problem: Problem, sp: lasp.SequenceParallel) -> dict[str, Tensor]:
    leaves = {}
    for name, tensor in problem.inputs.items():
        if tensor is not None:
            part = tensor if name == "initial_state" or tensor.dim() == 1 else sp.shard(tensor)
            leaves[name] = part.to(DEVICE, torch.float32, copy=True).requires_grad_()
    return leaves


def solved(
    problem: Problem,
    leaves: dict[str, Tensor],
    sp: lasp.SequenceParallel,
    *,
    compiled: bool = False,
    final: bool = True,
) -> dict[str, Tensor]:
    """Outputs, final state and gradients of this rank; queries are called while the exchange is under way.

    final: with the final state.
    """
    called_after = []
    before = sp.counters.messages

    def attend(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        begin = lasp.linear_attention_begin if beta is None else partial(lasp.delta_rule_begin, beta=beta)
        pending = begin(
            k, v, g=g, initial_state=initial, output_final_state=final, cu_seqlens=problem.cu_seqlens, sp=sp,
            backend="triton",
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            called_after.append(sp.counters.messages - before)
        return pending.finish(1.0 * q)

    torch._dynamo.reset()
    run_it = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    o, final_state = run_it(*(leaves.get(name) for name in ("q", "k", "v", "beta", "g", "initial_state")))
    assert compiled or called_after == [int("beta" not in leaves)], (
        "queries are computed while the exchange is under way"
    )
    share = (1 + 2 * sp.rank) / sp.size**2  # of the final states' gradient, the sum over ranks of which is 1
    outputs, d_outputs = {"o": o}, [sp.shard(problem.d_o).to(o)]
    if final:
        outputs["final_state"] = final_state
        d_outputs.append(share * problem.d_final.to(final_state))
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), d_outputs)
    return outputs | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def waits_or_computes(problem: Problem, rank: int) -> float:
    """0 if both ranks raise what is wrong with the documents of one, before any of them waits in vain."""
    sp = lasp.SequenceParallel(dist.group.WORLD, lengths=LENGTHS, exchange="all_gather", timeout_s=100)
    wrong = dataclasses.replace(problem, cu_seqlens=(0, 20, 71) if rank else (0, 20, 70))
    leaves = leaves_of(problem, sp) | {"initial_state": problem.inputs["initial_state"][:2].to(DEVICE, torch.float32)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    try:
        solved(wrong, leaves, sp, compiled=True)
    except lasp.ExchangeError as error:
        return 0.0 if "must rise from 0 to the 70 tokens" in str(error) else 1.0
    return 1.0


def main() -> None:
    problems = {gate: make(gate, **DIMS) for gate in GATES}
    problems |= {f"{gate}, packed": make(gate, **DIMS, cu_seqlens=BOUNDS) for gate in GATES}

    delta = make("scalar", **DIMS)
    delta.inputs["k"] = torch.nn.functional.normalize(delta.inputs["k"], dim=-1)
    delta.inputs["beta"] = torch.rand(delta.inputs["v"].shape[:3], generator=torch.Generator().manual_seed(0))
    packed = make("scalar", **DIMS, cu_seqlens=BOUNDS)
    packed.inputs.update({name: delta.inputs[name] for name in ("q", "k", "v", "g", "beta")})

    def work(rank: int) -> dict[str, float]:
        # Here and not before the fork: autograd's engine looks for GPUs, and then no child can use one.
        expected = {gate: solve(problem, "torch") for gate, problem in problems.items()}
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=LENGTHS, exchange="all_gather")
        errors: dict[str, float] = {}
        for gate, problem in problems.items():
            leaves = leaves_of(problem, sp)
            results = solved(problem, leaves, sp)
            for final in (True, False):
                if gate not in COMPILED[final]:
                    continue
                plain = results if final else solved(problem, leaves, sp, final=False)
                compiled = solved(problem, leaves, sp, compiled=True, final=final)
                way = f"compiled{'' if final else ' whole'}"
                errors |= {f"{gate} {name}, {way}": relative_error(compiled[name], plain[name]) for name in plain}
            for name, result in results.items():
                value, reference = result.detach().cpu(), expected[gate][name]
                if name == "d_initial_state" and rank > 0:
                    reference = torch.zeros_like(reference)
                elif name == "d_g" and value.dim() == 1:
                    dist.all_reduce(value)
                elif name not in ("final_state", "d_initial_state"):
                    reference = sp.shard(reference)
                errors[f"{gate} {name}"] = relative_error(value, reference)
        for name, problem, final in (("delta", delta, False), ("delta, packed", packed, True)):
            leaves = leaves_of(problem, sp)
            plain, compiled = (solved(problem, leaves, sp, compiled=way, final=final) for way in (False, True))
            errors |= {f"{name} {each}, compiled": relative_error(compiled[each], plain[each]) for each in plain}
        errors["wrong documents of a rank, compiled"] = waits_or_computes(packed, rank)
        return errors

    print(json.dumps(run(2, work)))


if __name__ == "__main__":
    main()
