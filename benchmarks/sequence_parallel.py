"""One attention layer over W ranks, forward and backward, against one rank; its recurrence alone, also against peers.

    torchrun --nproc-per-node 2 -m benchmarks.sequence_parallel --output FOLDER      (one process a GPU; minutes)
    python -m benchmarks.sequence_parallel --tiny --output FOLDER     (two gloo processes; a check of this script)
    python -m benchmarks.sequence_parallel --plot FOLDER/FILE.json --image FILE.png

The tokens of a rank stay the same, so W ranks have W times the sequence. The layer is a TransNormer's, from x in bf16
to the gradients of x and of its fp32 weights, under autocast (fp32 on the CPU); the recurrence is what of it crosses
ranks. First every method is compared with one process on a short sequence. Then, for each length, one rank alone (all
ranks at once, without a group), the schedules and every schedule's exchange by itself take turns; the slowest rank's
time counts. Of an exchange, exposed is what the work takes longer than on one rank, hidden the rest of what the
exchange takes by itself (negative where the work loses more than that). On GPUs all of it is measured twice: launched
by the host ("eager"), which bounds short sequences, and as replays of CUDA graphs ("graph"), which all ranks capture
or refuse.

The peers, whose time grows with the sequence, follow, each by itself and less often; with --authors PATH, a checkout
of the LASP authors' repository, their variants too, with tensors in their own layout. The file is written after every
step.

Two ranks on GPUs have a goal: with "auto", 32,768 tokens a rank cost at most 1.02 times one rank's, 8,192 tokens at
most 1.08 times, launched either way. It is the layer's, and if the layer misses one, the exit code is 1; how the
recurrence alone does is told too. Whatever is not right makes it 1 too, and is named at the end.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import lasp
from benchmarks.baselines.authors import authors_methods, authors_package
from benchmarks.baselines.delta import flashqla_over
from benchmarks.baselines.ring import ring_attention
from benchmarks.baselines.torch_ring import tokens_of, torch_ring
from benchmarks.baselines.ulysses import ulysses
from benchmarks.graphs import Captured, Graphs, Refused, largest_error
from benchmarks.parallel_kinds import DELTA, Kind, Method, Sample, Shape, constant_decays, kind_named, names
from benchmarks.processes import run
from benchmarks.sequence_parallel_report import goals, plot, table
from lasp.exchange import EXCHANGES, Auto, Constants
from lasp.exchange.measure import Timing, exchange_work, timings
from lasp.train.config import ParallelOptions, TrainConfig
from lasp.train.world import World, join, leave

RESULTS = Path(__file__).parent / "results"
# Relative errors against fp64 of what is computed in bf16 (on GPUs; softmax's gradients need the most) and fp32.
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
CHECKED_TOKENS = 192
# Schedules measured unless all are asked for, as far as they exist.
USUAL = ("ring", "all_gather")
ONE_RANK = ("eager", "one rank")
# Schedules whose host must know what the device found, which no capture allows.
ON_HOST = {"reach": Refused("its host reads which heads forget")}
# From here on a call takes long enough for fewer repetitions.
LONG_TOKENS = 131072

FULL, TINY = Shape(16, 128, (8192, 32768, LONG_TOKENS)), Shape(4, 16, (64, 128))


class Peer(NamedTuple):
    """Another method of q, k and v.

    Attributes:
        exact: the same on one device.
        of: the kind that it is beside.
        in_slices: a rank's tokens are those of `baselines.torch_ring.tokens_of`, and not consecutive.
        heads_first: tensors are [1, H, n, D]; they are so before the time is taken.
        is_alone: every rank has a sequence of its own.
        checked_tokens: of a rank, on which it is compared.
        most_tokens: of a rank, for which it is measured.
    """

    method: AbstractContextManager[Method]
    exact: Method
    of: str = "recurrence"
    in_slices: bool = False
    heads_first: bool = False
    is_alone: bool = False
    checked_tokens: int = CHECKED_TOKENS
    most_tokens: int = LONG_TOKENS


def step(method: Method, sample: Sample, parameters: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """The output, and the gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in sample.inputs]
    o = method(*leaves)
    return (o, *torch.autograd.grad(o, [*leaves, *parameters], sample.d_o))


class Bench:
    """All methods on the ranks of a world."""

    def __init__(
        self, world: World, shape: Shape, constants: Path | None, schedules: Sequence[str], kinds: Sequence[str]
    ) -> None:
        assert world.mesh is not None
        self.world, self.shape, self.mesh = world, shape, world.mesh["sp"]
        self.log_decay = constant_decays(shape, world.device)
        size = "tiny" if shape.head_dim == TINY.head_dim else "1b"
        self.kinds = {name: kind_named(name, shape, world.device, size=size) for name in kinds}
        chosen: Any = "auto" if constants is None else Auto(Constants.load(constants))
        self.groups = {
            name: lasp.SequenceParallel(self.mesh, exchange=exchange)
            for name, exchange in {"auto": chosen, **{name: name for name in schedules}}.items()
        }
        self.comm = self.groups["auto"].comm

    @property
    def is_cuda(self) -> bool:
        return self.world.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    def peers(self, authors: Path | None) -> dict[str, Peer]:
        """Each to be entered once."""
        peers = {name: peer for of in self.kinds if of.startswith(DELTA) for name, peer in self.flashqla(of).items()}
        if "recurrence" not in self.kinds:
            return peers
        group, sp, own = self.mesh.get_group(), self.groups["auto"], self.log_decay.chunk(self.world.size)
        exact = self.kinds["recurrence"].exact

        def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lasp.linear_attention(q, k, v, own[self.world.rank])[0]

        peers |= {
            "ulysses, linear": Peer(nullcontext(lambda q, k, v: ulysses(linear, q, k, v, group)), exact),
            "softmax, gathered": Peer(
                nullcontext(lambda q, k, v: lasp.softmax_attention(q, k, v, sp=sp)[0]), softmax_of_one
            ),
        }
        if not self.is_cuda:
            return peers | {
                "ring softmax": Peer(nullcontext(lambda q, k, v: ring_attention(q, k, v, group)), softmax_of_one)
            }
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            ring = Peer(torch_ring(self.mesh, backend), softmax_of_one, in_slices=True)
            peers[f"ring softmax, PyTorch's, {name}"] = ring
        return peers if authors is None else peers | self.peers_of_authors(authors)

    def flashqla(self, of: str) -> dict[str, Peer]:
        """FlashQLA's own context parallelism, where it is installed."""
        if not self.is_cuda or importlib.util.find_spec("flash_qla") is None:
            return {}
        kind = self.kinds[of]
        method = flashqla_over(self.mesh.get_group(), kind.heads)
        return {f"FlashQLA, {of}": Peer(nullcontext(method), kind.exact, of)}

    def peers_of_authors(self, checkout: Path) -> dict[str, Peer]:
        """Their outputs are not scaled."""
        variants, alone = authors_methods(checkout, self.log_decay, self.shape.head_dim, self.world.size)

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lasp.linear_attention(q, k, v, self.log_decay, scale=1.0, backend="torch")[0]

        def peer(method: Method) -> Peer:
            return Peer(nullcontext(method), exact, heads_first=True, checked_tokens=1024, most_tokens=32768)

        peers = {f"authors' {name}": peer(method) for name, method in variants.items()}
        return peers | {"authors' kernel on one rank": peer(alone)._replace(is_alone=True)}

    def check(self) -> dict[str, dict[str, float]]:
        """Errors of all schedules, of one rank with the whole sequence, and without an exchange, by kind.

        Right are errors that are small, or no larger than one rank's (a norm makes much of a token whose outputs are
        next to nothing), if without an exchange they are larger.
        """
        result: dict[str, dict[str, float]] = {}
        own = slice(self.world.rank * CHECKED_TOKENS, (self.world.rank + 1) * CHECKED_TOKENS)
        for of, kind in self.kinds.items():
            whole = kind.sample(CHECKED_TOKENS * self.world.size, self.world.device)
            references = step(kind.exact, whole.map(torch.Tensor.double))
            alone = self.worst(step(kind.over(None), whole), references)
            shard, expected = whole.map(lambda x: x[:, own]), [reference[:, own] for reference in references]
            errors = {
                name: self.worst(step(kind.over(group), shard), expected)
                for name, group in {**self.groups, "control: no exchange": None}.items()
            }
            *right, control = errors.values()
            is_right = max(right) < max(BOUNDS[self.dtype], 1.5 * alone) and control > 2 * max(right)
            result[of] = errors | {"one rank": alone, "is_right": is_right}
        return result

    def worst(self, values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
        """The largest relative error on any rank."""
        return max(row[0] for row in self.world.gather([largest_error(values, references)]))

    def error(self, kind: Kind, peer: Peer, method: Method) -> float:
        """The largest relative error, on any rank, of the output and the inputs' gradients on a short sequence."""
        rank, size = (0, 1) if peer.is_alone else (self.world.rank, self.world.size)
        tokens = peer.checked_tokens
        whole = kind.sample(tokens * size, self.world.device)
        own = torch.arange(rank * tokens, (rank + 1) * tokens)
        own = (tokens_of(rank, size, tokens * size) if peer.in_slices else own).to(self.world.device)
        references = step(peer.exact, whole.map(torch.Tensor.double))
        values = step(method, laid_out(whole.map(lambda x: x[:, own]), peer))
        if peer.heads_first:
            values = tuple(value.transpose(1, 2) for value in values)
        return self.worst(values, [reference[:, own] for reference in references])

    def schedules(self, of: str, tokens: int, repetitions: int, names: Sequence[str]) -> list[dict[str, Any]]:
        """One rank, the schedules named, and their exchanges by themselves, at so many tokens a rank."""
        kind, device = self.kinds[of], self.world.device
        sample = kind.sample(tokens, device, seed=self.world.rank)
        groups = {name: self.groups[name] for name in names}
        steps: dict[str, Callable[[], Any]] = {
            name: partial(step, kind.over(group), sample, kind.parameters)
            for name, group in {"one rank": None, **groups}.items()
        }
        exchanges = {
            name: exchange_work(self.comm, group.exchange, kind.load, device)
            for name, group in groups.items()
            if kind.load is not None
        }
        label = {"of": of, "tokens": tokens}
        rows = self.turns({**label, "launch": "eager"}, steps, exchanges, repetitions)
        if not self.is_cuda or not names:
            return rows
        graphs = Graphs(self.world, [group.comm for group in self.groups.values()], BOUNDS[self.dtype])
        label["launch"] = "graph"
        captures = {name: ON_HOST.get(name) or graphs.capture(work) for name, work in steps.items()}
        alone = {name: graphs.capture(work) for name, work in exchanges.items() if isinstance(captures[name], Captured)}
        named = captures | {f"{name}, the exchange by itself": capture for name, capture in alone.items()}
        refused = [
            {**label, "method": name, "refused": capture.reason}
            for name, capture in named.items()
            if isinstance(capture, Refused)
        ]
        captured = {name: capture.__call__ for name, capture in captures.items() if isinstance(capture, Captured)}
        captured_alone = {name: capture.__call__ for name, capture in alone.items() if isinstance(capture, Captured)}
        return rows + self.turns(label, captured, captured_alone, repetitions) + refused

    def turns(
        self,
        label: dict[str, Any],
        steps: Mapping[str, Callable[[], Any]],
        exchanges: Mapping[str, Callable[[], Any]],
        repetitions: int,
    ) -> list[dict[str, Any]]:
        """Rows of steps, one rank's among them, and of the exchanges in them, which take turns."""
        if "one rank" not in steps:
            return []
        # Calls queued without waiting hide the host's share where it can be hidden, as between a model's layers.
        calls = max(2, LONG_TOKENS // label["tokens"]) if self.is_cuda else 1
        works = [repeated(work, calls) for work in (*steps.values(), *exchanges.values())]
        repetitions = fewer(repetitions, label["tokens"], repetitions // 2)
        times = [each(timing, calls) for timing in timings(self.comm, works, self.world.device, repetitions)]
        of_steps = dict(zip(steps, times[: len(steps)], strict=True))
        of_exchanges = dict(zip(exchanges, times[len(steps) :], strict=True))
        one = of_steps.pop("one rank").median
        rows = [{**label, "method": "one rank", **figures(times[0])}]
        for name, timing in of_steps.items():
            exposed = timing.median - one
            row = {**label, "method": name, **figures(timing), "to_one": timing.median / one, "exposed_s": exposed}
            if name in of_exchanges:
                alone = of_exchanges[name].median
                row |= {"exchange_s": alone, "hidden_s": alone - exposed}
            rows.append(row)
        return rows

    def peer(self, name: str, peer: Peer, one: dict[int, float], repetitions: int) -> list[dict[str, Any]]:
        """A peer at its lengths, and if it is right. What it refuses is a result too."""
        rows: list[dict[str, Any]] = []
        kind, label = self.kinds[peer.of], {"of": peer.of, "launch": "eager", "method": name}
        with peer.method as method:
            # No error may leave the context: PyTorch's would stay in force.
            try:
                error = self.error(kind, peer, method)
                for tokens in (tokens for tokens in self.shape.tokens if tokens <= peer.most_tokens):
                    sample = laid_out(kind.sample(tokens, self.world.device, seed=self.world.rank), peer)
                    work, times = partial(step, method, sample), fewer(repetitions, tokens, 3)
                    (timing,) = timings(self.comm, [work], self.world.device, times, warmup=1)
                    row = {**label, "tokens": tokens, **figures(timing), "to_one": timing.median / one[tokens]}
                    rows.append(row | {"error": error, "is_right": error < BOUNDS[self.dtype]})
            except Exception as error:  # compilers of kernels have classes of their own
                rows.append({**label, "refused": str(error)[:300]})
        return rows


def laid_out(sample: Sample, peer: Peer) -> Sample:
    """[1, n, H, D] as the peer wants it."""
    return sample.map(lambda x: x.transpose(1, 2).contiguous()) if peer.heads_first else sample


def fewer(repetitions: int, tokens: int, most: int) -> int:
    """Repetitions at so many tokens a rank: at long ones no more than `most`, but one."""
    return max(1, min(repetitions, most) if tokens >= LONG_TOKENS else repetitions)


def softmax_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by its definition: PyTorch's function may stand for its ring when this is called."""
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


def scheduled(options: argparse.Namespace, is_cuda: bool) -> list[str]:
    """Schedules that are measured beside "auto"."""
    if options.schedules is not None:
        return list(options.schedules)
    return [*(EXCHANGES if options.all_schedules else USUAL), *(["peer"] if is_cuda else [])]


def measure(options: argparse.Namespace) -> int:
    """Measures in each of the processes; the first prints and writes. Returns 1 if a goal is missed."""
    if options.authors is not None:
        authors_package(options.authors)  # before anything is measured
    size = int(os.environ.get("WORLD_SIZE", "0")) or torch.distributed.get_world_size()
    layout = ParallelOptions(sp=size, timeout_s=300.0)
    world = join(TrainConfig(device=options.device, seq_len=size, parallel=layout))
    shape = TINY if options.tiny else FULL
    if options.tokens:
        shape = shape._replace(tokens=tuple(options.tokens))
    is_cuda = world.device.type == "cuda"
    where = torch.cuda.get_device_name(world.device) if is_cuda else f"CPU, {os.cpu_count()} cores, gloo"
    bench = Bench(world, shape, options.constants, scheduled(options, is_cuda), options.of)
    record: dict[str, Any] = {
        "what": "an attention layer, and its recurrence, constant decay, forward and backward, over ranks and on one",
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

    # Peers alone need one rank's recurrence all the same.
    peers = {} if options.only == "schedules" else bench.peers(options.authors)
    kinds, names = list(bench.kinds), list(bench.groups)
    if options.only == "peers":
        kinds, names = list(dict.fromkeys(peer.of for peer in peers.values())), []
    for tokens in shape.tokens:
        for of in kinds:
            keep(bench.schedules(of, tokens, options.repetitions, names))
    alone = [row for row in record["rows"] if (row["launch"], row["method"]) == ONE_RANK]
    for name, peer in peers.items():
        if options.peers is None or any(part in name for part in options.peers):
            one = {row["tokens"]: row["s"] for row in alone if row["of"] == peer.of}
            keep(bench.peer(name, peer, one, max(1, options.repetitions // 4)))
    wrong = [f"{of}: {errors}" for of, errors in record["errors"].items() if not errors["is_right"]]
    if world.is_first:
        print(f"{table(record)}\n\nwritten to {path}", *(f"WRONG: {line}" for line in wrong), sep="\n")
    leave(world)
    return int(bool(wrong) or any(goal["of"] == "layer" and not goal["met"] for goal in record["goals"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument(
        "--of", nargs="+", default=["recurrence", "layer"], help=f"of {', '.join(map(repr, names(FULL)))}"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="of a rank; default: 8192 32768 131072")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--constants", type=Path, help="for auto: what `lasp bench exchange --save` wrote")
    parser.add_argument("--all-schedules", action="store_true", help=f"not only auto, {', '.join(USUAL)}")
    parser.add_argument("--schedules", nargs="*", choices=[*EXCHANGES, "peer"], help="these, and auto, instead")
    parser.add_argument("--only", choices=("schedules", "peers"))
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="of the peers, those whose name has such a part")
    parser.add_argument("--authors", type=Path, metavar="PATH", help="a checkout of the LASP authors' repository; GPUs")
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
    known = names(TINY if options.tiny else FULL)
    if unknown := [of for of in options.of if of not in known]:
        parser.error(f"--of {unknown}: known are {', '.join(map(repr, known))}")
    if options.authors is not None and (options.tiny or options.device == "cpu" or not torch.cuda.is_available()):
        parser.error("--authors needs GPUs: their kernels run nowhere else")
    options.output.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        return measure(options)
    if not options.tiny:
        parser.error("start it with torchrun; alone it runs --tiny only")
    options.device = "cpu"
    return int(run(2, lambda rank: measure(options))[0])


if __name__ == "__main__":
    raise SystemExit(main())
