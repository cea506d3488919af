"""One attention layer's recurrence over W ranks, forward and backward, against one rank and against its peers.

    torchrun --nproc-per-node 2 -m benchmarks.sequence_parallel --output FOLDER      (one process a GPU; minutes)
    python -m benchmarks.sequence_parallel --tiny --output FOLDER     (two gloo processes; a check of this script)
    python -m benchmarks.sequence_parallel --plot FOLDER/FILE.json --image FILE.png

The tokens of a rank stay the same, so W ranks have W times the sequence. First every method is compared with one
process on a short sequence. Then, for each length, one rank alone (all ranks at once, without a group), every schedule
and every schedule's exchange by itself take turns; the slowest rank's time counts. Of an exchange, exposed is what a
layer takes longer than on one rank, hidden the rest of what the exchange takes by itself (negative where the layer
loses more than that). The peers, whose time grows with the sequence, follow, each by itself and less often. The file is
written after every step.

Two ranks on GPUs have a goal: with "auto", a layer of 32,768 tokens a rank costs at most 1.02 times one rank's, of
8,192 tokens at most 1.08 times; if one is missed, the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import lasp
from benchmarks.baselines.ring import ring_attention
from benchmarks.baselines.torch_ring import tokens_of, torch_ring
from benchmarks.baselines.ulysses import ulysses
from benchmarks.processes import run
from lasp.exchange import EXCHANGES, Auto, Constants, Load
from lasp.exchange.measure import Timing, exchange_work, timings
from lasp.train.config import ParallelOptions, TrainConfig
from lasp.train.world import World, join, leave

RESULTS = Path(__file__).parent / "results"
# Tokens a rank: what a layer over two GPUs may cost, in times of one.
GOALS = {8192: 1.08, 32768: 1.02}
# Relative errors against fp64 of what is computed in bf16 (on GPUs; softmax's gradients need the most) and fp32.
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
CHECKED_TOKENS = 192
SLOWEST_DECAY = 0.02

Method = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    heads: int
    head_dim: int
    tokens: tuple[int, ...]
    """Of a rank."""


FULL, TINY = Shape(16, 128, (8192, 32768, 131072)), Shape(4, 16, (64, 128))


class Layer(NamedTuple):
    """q, k, v, d_o [1, n, H, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor


class Peer(NamedTuple):
    method: AbstractContextManager[Method]
    exact: Method
    """The same on one device."""
    in_slices: bool = False
    """A rank's tokens are those of `baselines.torch_ring.tokens_of`, and not consecutive."""


def random_layer(tokens: int, shape: Shape, device: torch.device, seed: int = 0) -> Layer:
    random = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = (1, tokens, shape.heads, shape.head_dim)
    return Layer(*(torch.randn(size, device=device, generator=random).to(dtype) for _ in range(4)))


def step(method: Method, layer: Layer) -> tuple[Tensor, ...]:
    """o and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in layer[:3]]
    o = method(*leaves)
    return (o, *torch.autograd.grad(o, leaves, layer.d_o))


class Bench:
    """All methods on the ranks of a world."""

    def __init__(self, world: World, shape: Shape, constants: Path | None) -> None:
        assert world.mesh is not None
        self.world, self.shape, self.mesh = world, shape, world.mesh["sp"]
        self.log_decay = -SLOWEST_DECAY * torch.linspace(0.1, 1.0, shape.heads, device=world.device)
        chosen: Any = "auto" if constants is None else Auto(Constants.load(constants))
        self.groups = {
            name: lasp.SequenceParallel(self.mesh, exchange=exchange)
            for name, exchange in {"auto": chosen, **{name: name for name in EXCHANGES}}.items()
        }
        self.comm = self.groups["auto"].comm

    def recurrence(self, name: str | None) -> Method:
        """Over the ranks by a schedule, or on this one alone."""
        sp = None if name is None else self.groups[name]
        return lambda q, k, v: lasp.linear_attention(q, k, v, self.log_decay, sp=sp)[0]

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lasp.linear_attention(q, k, v, self.log_decay, backend="torch")[0]

    def peers(self) -> dict[str, Peer]:
        """Each to be entered once."""
        group, sp, own = self.mesh.get_group(), self.groups["auto"], self.log_decay.chunk(self.world.size)

        def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lasp.linear_attention(q, k, v, own[self.world.rank])[0]

        peers = {
            "ulysses, linear": Peer(nullcontext(lambda q, k, v: ulysses(linear, q, k, v, group)), self.exact),
            "softmax, gathered": Peer(
                nullcontext(lambda q, k, v: lasp.softmax_attention(q, k, v, sp=sp)[0]), softmax_of_one
            ),
        }
        if self.world.device.type == "cpu":
            return peers | {
                "ring softmax": Peer(nullcontext(lambda q, k, v: ring_attention(q, k, v, group)), softmax_of_one)
            }
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            peers[f"ring softmax, PyTorch's, {name}"] = Peer(torch_ring(self.mesh, backend), softmax_of_one, True)
        return peers

    def error(self, method: Method, exact: Method, *, in_slices: bool = False) -> float:
        """The largest relative error, on any rank, of o and the gradients on a short sequence."""
        rank, size = self.world.rank, self.world.size
        whole = random_layer(CHECKED_TOKENS * size, self.shape, self.world.device)
        own = torch.arange(rank * CHECKED_TOKENS, (rank + 1) * CHECKED_TOKENS)
        own = (tokens_of(rank, size, CHECKED_TOKENS * size) if in_slices else own).to(self.world.device)
        references = step(exact, Layer(*(t.double() for t in whole)))
        values = step(method, Layer(*(t[:, own] for t in whole)))
        errors = [
            ((value.double() - reference[:, own]).norm() / reference[:, own].norm()).item()
            for value, reference in zip(values, references, strict=True)
        ]
        # NaN is no error that max() would find.
        worst = [max(float("inf") if error != error else error for error in errors)]
        return max(row[0] for row in self.world.gather(worst))

    def check(self) -> dict[str, float]:
        """Errors of all schedules. Raises RuntimeError if one is too large, or if without an exchange it is not."""
        errors = {name: self.error(self.recurrence(name), self.exact) for name in self.groups}
        bound, control = BOUNDS[self.dtype], self.error(self.recurrence(None), self.exact)
        if max(errors.values()) >= bound or control < 10 * bound:
            raise RuntimeError(
                f"errors are to be below {bound}, and far above without an exchange, {control}: {errors}"
            )
        return errors | {"control: no exchange": control}

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.world.device.type == "cuda" else torch.float32

    def schedules(self, tokens: int, repetitions: int) -> list[dict[str, Any]]:
        """One rank, every schedule, and its exchange by itself, at so many tokens a rank."""
        layer = random_layer(tokens, self.shape, self.world.device, seed=self.world.rank)
        # Calls queued without waiting hide the host's share where it can be hidden, as between a model's layers.
        calls = max(3, 131072 // tokens) if self.world.device.type == "cuda" else 1
        names: list[str | None] = [None, *self.groups]
        load = Load(self.shape.heads, self.shape.head_dim, self.shape.head_dim, 1)
        works = [repeated(partial(step, self.recurrence(name), layer), calls) for name in names]
        works += [
            repeated(exchange_work(self.comm, group.exchange, load, self.world.device), calls)
            for group in self.groups.values()
        ]
        times = [each(timing, calls) for timing in timings(self.comm, works, self.world.device, repetitions)]
        one, layers, alone = times[0], times[1 : len(names)], times[len(names) :]
        rows = [{"tokens": tokens, "method": "one rank", **figures(one)}]
        for name, whole, exchange in zip(self.groups, layers, alone, strict=True):
            exposed = whole.median - one.median
            rows.append(
                {
                    "tokens": tokens,
                    "method": name,
                    **figures(whole),
                    "to_one": whole.median / one.median,
                    "exchange_s": exchange.median,
                    "exposed_s": exposed,
                    "hidden_s": exchange.median - exposed,
                }
            )
        return rows

    def peer(self, name: str, peer: Peer, one: dict[int, float], repetitions: int) -> list[dict[str, Any]]:
        """A peer at all lengths, if it is right. What it refuses is a result too."""
        rows: list[dict[str, Any]] = []
        with peer.method as method:
            # No error may leave the context: PyTorch's would stay in force.
            try:
                error = self.error(method, peer.exact, in_slices=peer.in_slices)
                for tokens in self.shape.tokens:
                    layer = random_layer(tokens, self.shape, self.world.device, seed=self.world.rank)
                    work = partial(step, method, layer)
                    (timing,) = timings(self.comm, [work], self.world.device, repetitions, warmup=1)
                    row = {"tokens": tokens, "method": name, **figures(timing), "to_one": timing.median / one[tokens]}
                    rows.append(row | {"error": error, "is_right": error < BOUNDS[self.dtype]})
            except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
                rows.append({"method": name, "refused": str(error)[:300]})
        return rows


def softmax_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By its definition: PyTorch's function may stand for its ring when this is called."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def repeated(work: Callable[[], object], calls: int) -> Callable[[], object]:
    def several() -> None:
        for _ in range(calls):
            work()

    return several


def each(timing: Timing, calls: int) -> Timing:
    return Timing(*(seconds / calls for seconds in timing))


def figures(timing: Timing) -> dict[str, Any]:
    return {"s": timing.median, "quartiles_s": timing[1:]}


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that this run could reach or miss: of two ranks on GPUs."""
    if record["device"] == "cpu" or record["ranks"] != 2:
        return []
    ratios = {row["tokens"]: row["to_one"] for row in record["rows"] if row["method"] == "auto"}
    return [
        {"tokens": tokens, "at_most": most, "got": ratios[tokens], "met": ratios[tokens] <= most}
        for tokens, most in GOALS.items()
        if tokens in ratios
    ]


def table(record: dict[str, Any]) -> str:
    """In Markdown: milliseconds."""
    lines = [
        f"{record['ranks']} ranks, {record['where']}, H={record['heads']} D={record['head_dim']} {record['dtype']}, "
        f"forward and backward, torch {record['torch']}",
        "",
        "| tokens a rank | method | ms | times one rank | exchange alone | exposed | hidden |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "refused" in row:
            lines.append(f"| | {row['method']} | refused: {row['refused'][:80]} | | | | |")
            continue
        times = "" if "to_one" not in row else f"{row['to_one']:.3f}"
        exchange = [f"{1e3 * row[name]:.3f}" if name in row else "" for name in ("exchange_s", "exposed_s", "hidden_s")]
        wrong = "" if row.get("is_right", True) else f" (wrong: error {row['error']:.1e})"
        cells = (f"{row['tokens']:,}", row["method"] + wrong, f"{1e3 * row['s']:.3f}", times, *exchange)
        lines.append(f"| {' | '.join(cells)} |")
    for goal in record["goals"]:
        lines.append(
            f"\ngoal at {goal['tokens']:,} tokens: at most {goal['at_most']}, got {goal['got']:.3f}: "
            + ("met" if goal["met"] else "MISSED")
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], image: Path) -> None:
    """Left, times one rank's by method and length; right, the exchange's exposed and hidden time by schedule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in record["rows"] if "to_one" in row]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line = "-" if "exchange_s" in own[0] else "--"
        left.plot([row["tokens"] for row in own], [row["to_one"] for row in own], line, marker=".", label=method)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="tokens a rank", ylabel="time, in times one rank's")
    left.legend(frameon=False, fontsize=7)
    longest = max(row["tokens"] for row in rows)
    own = [row for row in rows if row["tokens"] == longest and "exchange_s" in row]
    names = [row["method"] for row in own]
    right.barh(names, [1e6 * row["exchange_s"] for row in own], color="lightgrey", label="exchange by itself")
    right.barh(names, [1e6 * row["exposed_s"] for row in own], height=0.4, label="exposed in the layer")
    right.set(xlabel="microseconds, forward and backward", title=f"{longest:,} tokens a rank")
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{record['ranks']} ranks, {record['where']}", fontsize=10)
    figure.savefig(image, dpi=120)


def measure(options: argparse.Namespace) -> int:
    """In each of the processes; the first prints and writes. 1 if a goal is missed."""
    size = int(os.environ.get("WORLD_SIZE", "0")) or torch.distributed.get_world_size()
    layout = ParallelOptions(sp=size, timeout_s=300.0)
    world = join(TrainConfig(device=options.device, seq_len=size, parallel=layout))
    shape = TINY if options.tiny else FULL
    if options.tokens:
        shape = shape._replace(tokens=tuple(options.tokens))
    is_cuda = world.device.type == "cuda"
    where = torch.cuda.get_device_name(world.device) if is_cuda else f"CPU, {os.cpu_count()} cores, gloo"
    bench = Bench(world, shape, options.constants)
    record: dict[str, Any] = {
        "what": "one layer's recurrence, constant decay, forward and backward, over ranks and on one",
        "date": datetime.date.today().isoformat(),
        "device": world.device.type,
        "where": where,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": world.size,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "repetitions": options.repetitions,
        "constants": None if options.constants is None else Constants.load(options.constants).source,
        "errors": bench.check(),
        "rows": [],
        "goals": [],
    }
    slug = where.lower().replace(" ", "-") if is_cuda else "cpu"
    path = options.output / f"{record['date']}-{slug}-sequence-parallel-{world.size}-ranks.json"

    def keep(rows: list[dict[str, Any]]) -> None:
        record["rows"] += rows
        record["goals"] = goals(record)
        if world.is_first:
            path.write_text(json.dumps(record, indent=1) + "\n")

    for tokens in shape.tokens:
        keep(bench.schedules(tokens, options.repetitions))
    one = {row["tokens"]: row["s"] for row in record["rows"] if row["method"] == "one rank"}
    for name, peer in bench.peers().items():
        keep(bench.peer(name, peer, one, max(1, options.repetitions // 4)))
    if world.is_first:
        print(f"{table(record)}\n\nwritten to {path}")
    leave(world)
    return int(any(not goal["met"] for goal in record["goals"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--tokens", type=int, nargs="+", help="of a rank; default: 8192 32768 131072")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--constants", type=Path, help="for auto: what `lasp bench exchange --save` wrote")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="small shapes, which check the script and measure nothing")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing, print and draw this")
    parser.add_argument("--image", type=Path, default=Path("docs/img/sequence-parallel.png"))
    options = parser.parse_args()
    if options.plot is not None:
        record = json.loads(options.plot.read_text())
        plot(record, options.image)
        print(table(record))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        return measure(options)
    if not options.tiny:
        parser.error("start it with torchrun; alone it runs --tiny only")
    options.device = "cpu"
    return int(run(2, lambda rank: measure(options))[0])


if __name__ == "__main__":
    raise SystemExit(main())
