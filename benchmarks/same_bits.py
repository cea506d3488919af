"""Two revisions give the same bits: outputs and all gradients of every recurrence, backend and preset on CPUs.

    python benchmarks/same_bits.py REV_A REV_B

Both revisions are unpacked into folders and run by this script, which calls nothing but the package's public functions:
every gate, with and without packed documents, initial and final states and grouped heads, in every dtype and by every
backend that runs on a CPU (Triton's kernels in its interpreter), on one process and, over every schedule, on three; and
a training step of every preset. Printed are the tensors that differ, and the largest difference over all. Exit code 1
where it is not 0, or where the control, one input changed in its last bit, shows no difference. A revision may also be
a file of an earlier run: `PYTHONPATH=CHECKOUT/src TRITON_INTERPRET=1 python benchmarks/same_bits.py --measure FILE`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TOKENS, HEADS, GROUPS, KEYS, VALUES = 24, 2, 2, 16, 16
PACKED = (0, 5, 5, 17, 24)
RANKS = 3
LENGTHS = (9, 0, 15)
GATES = {"linear_attention": ("none", "constant", "scalar", "channel"), "delta_rule": ("none", "scalar", "channel")}


class Case:
    """A call of one operator on inputs that its name decides."""

    def __init__(self, operator: str, gate: str, backend: str, dtype: str, documents: bool, final: bool) -> None:
        self.operator, self.gate, self.backend, self.dtype = operator, gate, backend, dtype
        self.documents, self.final = documents, final
        self.name = " ".join((operator, gate, backend, dtype, "packed" * documents, "final" * final)).strip()

    def inputs(self, changed: bool) -> dict[str, Any]:
        import torch

        random = torch.Generator().manual_seed(7)
        dtype = getattr(torch, self.dtype)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        heads = HEADS * GROUPS

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        k = torch.nn.functional.normalize(normal(1, TOKENS, HEADS, KEYS), dim=-1)
        found = {"q": normal(1, TOKENS, HEADS, KEYS), "k": k, "v": normal(1, TOKENS, heads, VALUES)}
        found = {name: tensor.to(dtype) for name, tensor in found.items()}
        if self.operator == "delta_rule":
            found["beta"] = normal(1, TOKENS, heads).sigmoid().to(state_dtype)
        shape = {"constant": (heads,), "scalar": (1, TOKENS, heads), "channel": (1, TOKENS, heads, KEYS)}.get(self.gate)
        if shape is not None:
            found["g"] = (-0.1 * normal(*shape).abs()).to(state_dtype)
        states = len(PACKED) - 1 if self.documents else 1
        found["initial_state"] = normal(states, heads, KEYS, VALUES).to(state_dtype)
        if changed:
            found["k"].view(-1)[0] = torch.nextafter(found["k"].view(-1)[0], torch.tensor(9.0, dtype=dtype))
        return found

    def compute(self, sp: Any, changed: bool = False) -> list[Any]:
        """Outputs and gradients of all inputs, on this rank."""
        import torch

        import lasp

        inputs = self.inputs(changed)
        if sp is not None:
            whole = ("initial_state", "g" if self.gate == "constant" else "")
            inputs = {name: tensor if name in whole else sp.shard(tensor) for name, tensor in inputs.items()}
        inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        tensors = dict(inputs)
        initial = tensors.pop("initial_state")
        options = {"initial_state": initial, "output_final_state": self.final, "sp": sp, "backend": self.backend}
        if self.documents:
            options["cu_seqlens"] = PACKED
        o, final = getattr(lasp, self.operator)(**tensors, **options)
        outputs = [o] if final is None else [o, final]
        random = torch.Generator().manual_seed(8)
        d_outputs = [torch.randn(t.shape, generator=random, dtype=torch.float64).to(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), d_outputs)
        return [t.detach() for t in (*outputs, *gradients)]


def cases() -> Iterator[Case]:
    for operator, gates in GATES.items():
        for gate in gates:
            for backend in ("torch", "reference", "triton"):
                if backend == "triton" and operator == "delta_rule":
                    continue
                # The interpreter has no bf16.
                for dtype in ("float32", "float16") if backend == "triton" else ("float64", "float32", "bfloat16"):
                    for documents in (False, True):
                        yield Case(operator, gate, backend, dtype, documents, final=True)
                    yield Case(operator, gate, backend, dtype, documents=False, final=False)


# In a process of one revision.


def over_ranks(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    import lasp
    from lasp.exchange import EXCHANGES

    found = {}
    names = sorted(EXCHANGES)
    for position, schedule in enumerate(names):
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=LENGTHS, exchange=schedule)
        for number, case in enumerate(cases()):
            # Every case by one schedule; every schedule meets every recurrence of the chunked backend.
            if number % len(names) == position or (case.backend == "torch" and case.dtype == "float32" and case.final):
                found[f"{case.name}, {schedule}, rank {rank}"] = case.compute(sp)
    torch.save(found, f"{folder}/{rank}.pt")


def training_steps() -> dict[str, list[Any]]:
    import torch

    from lasp.models import NAMES, CausalLM, preset

    found = {}
    for name in NAMES:
        torch.manual_seed(3)
        model = CausalLM(preset(name, "tiny", vocab_size=31))
        tokens = torch.randint(31, (2, 33), generator=torch.Generator().manual_seed(4))
        logits = model(tokens[:, :-1])
        logits = logits[0] if isinstance(logits, tuple) else logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[f"training step, {name}"] = [loss.detach(), *gradients]
    return found


def measure(output: Path) -> None:
    import torch

    sys.path.insert(0, str(HERE.parent.parent))
    from benchmarks.processes import run

    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # First: autograd's threads do not outlive a fork.
        run(RANKS, partial(over_ranks, folder=folder), deadline_s=3600.0)
        for rank in range(RANKS):
            found |= torch.load(f"{folder}/{rank}.pt")
    found |= {case.name: case.compute(None) for case in cases()} | training_steps()
    found["control"] = next(cases()).compute(None, changed=True)
    torch.save(found, output)


# In the process that compares.


def difference(a: Any, b: Any) -> float:
    """The largest of two tensors; infinite where only one is NaN or the forms differ."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b) or a.numel() == 0:
        return 0.0
    apart = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(apart.masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max())


def tensor_names(case: str, count: int) -> list[str]:
    """Names of what `Case.compute` or a training step gives, in its order."""
    operator, gate, *_ = case.split()
    if operator not in GATES:
        return ["loss", *(f"gradient {number}" for number in range(1, count))]
    inputs = ["q", "k", "v"] + ["beta"] * (operator == "delta_rule") + ["g"] * (gate != "none") + ["initial_state"]
    return ["o", *["final_state"] * (count > len(inputs) + 1), *(f"d_{name}" for name in inputs)]


def measured(revision: str, folder: Path) -> dict[str, list[Any]]:
    """Returns what a revision computes; one of this repository, or a checkout's folder."""
    import torch

    if Path(revision).is_file():
        saved: dict[str, list[Any]] = torch.load(revision)
        return saved
    source = Path(revision).resolve() if Path(revision).is_dir() else folder / "source"
    if not source.is_dir():
        source.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", revision], cwd=HERE.parent, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "x", "-C", str(source)], input=archive.stdout, check=True)
    variables = {**os.environ, "PYTHONPATH": str(source / "src"), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    output = folder / "found.pt"
    command = [sys.executable, str(HERE), "--measure", str(output)]
    subprocess.run(command, cwd=folder, env=variables, check=True)
    found: dict[str, list[Any]] = torch.load(output)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", help="two of this repository, or folders of checkouts")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
        return 0
    if len(options.revisions) != 2:
        parser.error("give two revisions")
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("a", "b")]
        for place in places:
            place.mkdir()
        a, b = (measured(*pair) for pair in zip(options.revisions, places, strict=True))
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    control, first = b.pop("control"), b[next(cases()).name]
    seen = max(map(difference, control, first)) > 0
    apart: dict[str, dict[str, float]] = {}
    for name, tensors in b.items():
        found = map(difference, a[name], tensors)
        for tensor, value in zip(tensor_names(name, len(tensors)), found, strict=True):
            if value != 0:
                apart.setdefault(name, {})[tensor] = value
    for name, values in apart.items():
        print(f"{name}:", ", ".join(f"{tensor} {value:.2g}" for tensor, value in values.items()))
    worst = max((value for values in apart.values() for value in values.values()), default=0.0)
    count = sum(len(tensors) for tensors in b.values())
    print(
        f"{len(b)} cases, {count} tensors: {len(apart)} of the cases differ, max difference {worst:.3g}; control",
        end=" ",
    )
    print("seen" if seen else "NOT SEEN")
    return int(bool(apart) or not seen)


if __name__ == "__main__":
    raise SystemExit(main())
