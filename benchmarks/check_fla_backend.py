"""The delta rule's backend "fla" on a GPU: two processes on one GPU against one, and both against fp64.

    python benchmarks/check_fla_backend.py --output benchmarks/results
    python benchmarks/check_fla_backend.py --backend torch --device cpu --tokens 300 --dim 16     # the script itself

needs flash-linear-attention (`pip install "fla-core==0.6.0"`, or `make oracle` and PYTHONPATH=build/oracle). The
processes speak gloo, which lets them share a GPU. Outputs, final state and all gradients are compared on every rank,
over every exchange given and equal and unequal shards. One process computes the sequence whole, and in the ranks'
pieces one after another, each from the state before (autograd goes through all of them): the same cuts of the library's
chunks as on the ranks, and no exchange. SP=2 must agree with one of the two within the bounds below, or be no farther
from fp64 than the worse of them is on the same shard (by a tenth: results rounded apart differ by more than either
errs). SP=1 is compared with the chunked PyTorch backend in fp64; and for scale that one on the same 16-bit inputs. A
table, a JSON file, and exit code 1 if a bound is missed.

Where fla's gated kernels are refused (Triton before 3.7.1 on Hopper), the message is printed and Gated DeltaNet's
gate is spread over the channels for KDA's kernels: the same recurrence, by other kernels, and the result says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peer_tuning import take_part
from torch import Tensor

import lasp
from lasp.exchange import EXCHANGES

# Relative errors of outputs and states, and of gradients, with 16-bit inputs and fp32 states.
OUTPUT_BOUND, GRADIENT_BOUND = 5e-3, 8e-3
# fla holds the states of chunks and its triangular systems in 16 bits; more than this is a mistake.
TRUTH_BOUND = 3e-2
# How much farther from fp64 SP=2 may be than SP=1.
WORSE_THAN_SINGLE = 1.1


def make(gate: str, tokens: int, heads: int, value_heads: int, dim: int, device: str, dtype: torch.dtype) -> dict:
    """A problem that depends on its sizes alone: inputs and the gradients of its outputs."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    run = (1, tokens, value_heads)
    gates = {"none": None, "head": -0.05 * uniform(*run), "channel": -0.05 * uniform(*run, dim)}
    halves = {
        "q": normal(1, tokens, heads, dim),
        "k": normal(1, tokens, heads, dim),
        "v": normal(*run, dim),
        "d_o": normal(*run, dim),
    }
    rest = {
        "beta": uniform(*run),
        "g": gates[gate],
        "initial_state": normal(1, value_heads, dim, dim),
        "d_final": normal(1, value_heads, dim, dim),
    }
    problem = {name: t.to(device, dtype) for name, t in halves.items()}
    return {**problem, **{name: t.to(device) for name, t in rest.items() if t is not None}}


def solve(
    problem: dict,
    backend: str,
    sp: lasp.SequenceParallel | None = None,
    spread: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> dict:
    """Outputs, final state and gradients; of this rank's shard where there are ranks.

    lengths: compute so many tokens at a time, each from the state before; all at once if None.
    """
    whole = ("initial_state", "d_final")
    local = {name: t if sp is None or name in whole else sp.shard(t) for name, t in problem.items()}
    d_o, d_final = local.pop("d_o"), local.pop("d_final")
    leaves = {name: t.detach().clone().requires_grad_() for name, t in local.items()}
    state, outputs, first = leaves["initial_state"], [], 0
    for tokens in lengths or (d_o.shape[1],):
        part = {name: t[:, first : first + tokens] for name, t in leaves.items() if name != "initial_state"}
        g = part.get("g")
        if g is not None and spread:
            g = g[..., None].expand(*g.shape, part["k"].shape[-1])
        o, state = lasp.delta_rule(
            part["q"], part["k"], part["v"], part["beta"], g, initial_state=state,
            output_final_state=True, normalize_qk=True, sp=sp, backend=backend,
        )  # fmt: skip
        outputs.append(o)
        first += tokens
    o = torch.cat(outputs, 1)
    torch.autograd.backward((o, state), (d_o.to(o.dtype), d_final.to(state.dtype) / (1 if sp is None else sp.size)))
    return {"o": o.detach(), "final_state": state.detach(), **{f"d_{name}": t.grad for name, t in leaves.items()}}


def shard_of(whole: dict, sp: lasp.SequenceParallel) -> dict:
    """This rank's part of the results of one process."""

    def part(name: str, value: Tensor) -> Tensor:
        if name == "d_initial_state":
            return value if sp.rank == 0 else torch.zeros_like(value)
        return value if name == "final_state" else sp.shard(value)

    return {name: part(name, value) for name, value in whole.items()}


def errors(got: dict, expected: dict) -> dict[str, float]:
    """Relative errors; absolute ones where zero is expected."""
    result = {}
    for name, value in got.items():
        difference = (value.double() - expected[name].double()).norm().item()
        size = expected[name].double().norm().item()
        result[name] = difference / size if size > 0 else difference
    return result


def in_turn(rank: int, function: Callable[[], Any]) -> Any:
    """`function()` on rank 0 and then on the others, which find its kernels compiled."""
    result = function() if rank == 0 else None
    dist.barrier()
    result = function() if rank > 0 else result
    dist.barrier()
    return result


def alone_of(problem: dict, options: argparse.Namespace) -> tuple[dict, str | None]:
    """Results of one process, and why the gate had to be spread over the channels, or None."""
    try:
        return solve(problem, options.backend), None
    except ValueError as refusal:
        if "g" not in problem or problem["g"].dim() != 3:
            raise
        return solve(problem, options.backend, spread=True), str(refusal)


def compare(rank: int, size: int, gate: str, options: argparse.Namespace) -> dict[str, Any]:
    """One recurrence: relative errors by tensor, the largest of all ranks, exchanges and shards."""
    dtype = getattr(torch, options.dtype)
    problem = make(gate, options.tokens, options.heads, 2 * options.heads, options.dim, options.device, dtype)
    start = time.perf_counter()
    alone, refusal = in_turn(rank, lambda: alone_of(problem, options))
    exact = solve({name: t.double() for name, t in problem.items()}, "torch")
    single, scale = errors(alone, exact), errors(solve(problem, "torch"), exact)
    ragged = (options.tokens // 2 + 37, *[0] * (size - 2), options.tokens - options.tokens // 2 - 37)
    split: dict[str, float] = {}
    pieces: dict[str, float] = {}
    worse: dict[str, float] = {}
    chained = {}
    for lengths in (None, ragged):
        cut = lengths or tuple(len(part) for part in torch.arange(options.tokens).tensor_split(size))
        pieces_of = tuple(tokens for tokens in cut if tokens > 0)
        chained[lengths] = solve(problem, options.backend, None, refusal is not None, pieces_of)
    for exchange in options.exchanges.split(","):
        for lengths in (None, ragged):
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange, lengths=lengths)
            results = solve(problem, options.backend, sp, refusal is not None)
            own, parts, truth = (shard_of(whole, sp) for whole in (alone, chained[lengths], exact))
            to_fp64, of_single, of_pieces = (errors(each, truth) for each in (results, own, parts))
            to_pieces = errors(results, parts)
            for name, error in errors(results, own).items():
                split[name] = max(split.get(name, 0.0), error)
                pieces[name] = max(pieces.get(name, 0.0), to_pieces[name])
                allowed = WORSE_THAN_SINGLE * max(of_single[name], of_pieces[name]) + 1e-4
                worse[name] = max(worse.get(name, 0.0), to_fp64[name] / allowed)
    # The control: with nothing carried from rank to rank, the comparison fails on the last.
    sp = lasp.SequenceParallel(dist.group.WORLD)
    local = {name: sp.shard(t) if t.dim() > 2 and t.shape[1] == options.tokens else t for name, t in problem.items()}
    control = errors(solve(local, options.backend, None, refusal is not None), shard_of(alone, sp))["o"]
    everywhere: list = [None] * size
    dist.all_gather_object(everywhere, (split, pieces, worse, control))
    split, pieces, worse = (
        {name: max(each[index][name] for each in everywhere) for name in split} for index in range(3)
    )
    bounds = {name: OUTPUT_BOUND if name in ("o", "final_state") else GRADIENT_BOUND for name in split}
    good = {
        name: (min(split[name], pieces[name]) < bounds[name] or worse[name] <= 1) and single[name] < TRUTH_BOUND
        for name in split
    }
    return {
        "split_to_single": split,
        "split_to_pieces": pieces,
        "split_to_fp64_of_allowed": worse,
        "single_to_fp64": single,
        "torch_to_fp64": scale,
        "good": good,
        "control": everywhere[-1][3],
        "refused": refusal,
        "seconds": time.perf_counter() - start,
    }


def show(title: str, found: dict[str, Any], size: int) -> None:
    if found["refused"]:
        print(f"{title}: refused, as it should be: {found['refused']}\n{title}: gate spread over the channels instead")
    for name in found["good"]:
        print(
            f"{title:15} {name:16} SP={size} vs SP=1 {found['split_to_single'][name]:.1e}, in the same pieces "
            f"{found['split_to_pieces'][name]:.1e}   "
            f"SP=1 vs fp64 {found['single_to_fp64'][name]:.1e}   torch vs fp64 {found['torch_to_fp64'][name]:.1e}   "
            f"of what these allow {found['split_to_fp64_of_allowed'][name]:.2f}   "
            f"{'ok' if found['good'][name] else 'MISSED'}"
        )
    seen = found["control"] > 10 * OUTPUT_BOUND
    print(f"{title:15} nothing carried: {found['control']:.1e} {'(seen)' if seen else 'NOT SEEN'}", flush=True)


def versions(options: argparse.Namespace) -> dict[str, str]:
    found = {"torch": torch.__version__, "device": options.device}
    for name in ("triton", "fla-core") if options.backend == "fla" else ():
        found[name] = importlib.metadata.version(name)
    if options.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return found


def work(rank: int, size: int, store: str, options: argparse.Namespace) -> None:
    if options.backend == "fla" and not options.tune:
        # Do not time kernels' configurations, which takes minutes: correctness is what is asked.
        take_part(0, sys.maxsize)
    if options.device == "cuda":
        torch.cuda.set_device(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results = {}
    for title, gate in (("DeltaNet", "none"), ("Gated DeltaNet", "head"), ("KDA", "channel")):
        results[title] = compare(rank, size, gate, options)
        if rank == 0:
            show(title, results[title], size)
    good = all(all(each["good"].values()) and each["control"] > 10 * OUTPUT_BOUND for each in results.values())
    if rank == 0:
        record: dict[str, Any] = {
            "what": f"delta rules, backend {options.backend}, {size} processes on one device over gloo",
            "date": datetime.date.today().isoformat(),
            "versions": versions(options),
            "options": {name: value for name, value in vars(options).items() if name != "output"},
            "results": results,
            "good": good,
        }
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            name = record["versions"]["device"].lower().replace(" ", "-")
            path = options.output / f"{record['date']}-{name}-fla-backend.json"
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(f"written to {path}")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if good else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=2, help="of queries and keys; values have twice as many")
    parser.add_argument("--dim", type=int, default=128, help="key and value channels of a head")
    parser.add_argument("--backend", default="fla")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exchanges", default="all_gather,ring", help=f"some of {', '.join(EXCHANGES)}")
    parser.add_argument("--tune", action="store_true", help="let fla time its configurations first (minutes)")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    print(", ".join(f"{name} {version}" for name, version in versions(options).items()), options.dtype, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        mp.start_processes(work, (options.processes, store, options), options.processes, start_method="spawn")
    print("The split recurrence is the same recurrence.")


if __name__ == "__main__":
    main()
