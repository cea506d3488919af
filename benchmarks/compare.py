"""Revisions of the kernels in turns in one run on one GPU: are later ones as fast as the first?

    python benchmarks/compare.py BASE BASE NEW                          # revisions of this repository, unpacked by git
    python benchmarks/compare.py old old new --output FILE              # or folders of checkouts, without git
    python benchmarks/compare.py BASE BASE NEW --stubbed                # the host alone, where there is no GPU

Each revision named is measured in processes of its own, with `lasp` from its checkout and the measuring code of this
folder; the base named twice shows what a ratio of equal code is. Each row of `benchmarks/kernels.py` (kernels alone, by
CUDA graphs; and eager calls) and of `benchmarks/host_cost.py` all measure in turns, A B C, C B A, and so on, so that
none has the cooler device. Printed are each revision's median over rounds, its ratio to the base's, and the least and
the most of the rounds' ratios.

What a host does is the same at every call, and whatever else a machine does adds to it; and processes of one program
differ, by where their memory lies, more than revisions do. So a revision's host time is the least of all rounds of
`--processes` of them, which live side by side and work in turns on one processor, in many short rounds without garbage
collection; least and most are then of the processes' own ratios. Exit code 1 where a ratio is beyond the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
HOST_KINDS = ("none", "constant", "scalar", "channel")
KERNEL_PARTS = ("forward, kernels", "both, kernels", "forward", "both")
HOST_PARTS = ("forward", "both", "both on one thread")
HOST_ROUNDS, HOST_WARM_UP = 12, 3  # of each of compare's own


class Compared(NamedTuple):
    """A row: times in ms, their ratio B / A, and the least and the most of the rounds' or processes' ratios."""

    name: str
    revision: str
    a: float
    b: float
    ratio: float
    least: float
    most: float


def compared(
    name: str,
    revision: str,
    times_a: list[float],
    times_b: list[float],
    typical: Callable[[list[float]], float] = statistics.median,
) -> Compared:
    ratios = [b / a for a, b in zip(times_a, times_b, strict=True)]
    a, b = typical(times_a), typical(times_b)
    return Compared(name, revision, a, b, b / a, min(ratios), max(ratios))


def slower(rows: list[Compared], limit: float) -> list[Compared]:
    """The rows beyond the limit; what is no number is."""
    return [row for row in rows if not row.ratio <= limit]


# In the process of a revision.


def kernel_calls(shape: str, kind: str) -> dict[str, Callable[[], float]]:
    """Functions that give milliseconds, by part."""
    import kernels
    import torch

    x = kernels.inputs(kernels.SHAPES[shape], kind)
    detached = {name: tensor.detach() for name, tensor in x.items()}
    steps = {"forward": lambda: kernels.ours(detached), "both": lambda: kernels.step(kernels.ours, x)}
    calls: dict[str, Callable[[], float]] = {}

    def median(work: Callable[[], Any]) -> float:
        return float(kernels.milliseconds(work)["median"])

    for part, step in steps.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        calls[f"{part}, kernels"] = partial(median, graph.replay)
        calls[part] = partial(median, step)
    return calls


def host_calls(kind: str, stubbed: bool) -> dict[str, Callable[[], float]]:
    """Returns functions that give milliseconds, by part: the least of a few rounds."""
    import host_cost
    import torch

    if stubbed:
        host_cost.stub_launches()
    x = host_cost.inputs(kind, stubbed=stubbed)

    def least(call: Callable[..., Any]) -> float:
        found = host_cost.host_milliseconds(partial(call, x, "triton"), HOST_ROUNDS, HOST_WARM_UP)
        return float(found["min"])

    def one_thread() -> float:
        with torch.autograd.set_multithreading_enabled(False):
            return least(host_cost.both)

    host_cost.both(x, "triton")  # compiles, while the other processes do
    both = partial(least, host_cost.both)
    return {"forward": partial(least, host_cost.forward), "both": both, "both on one thread": one_thread}


def pin(processors: set[int]) -> None:
    """Leave all threads of this process these processors, where the system can be told."""
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), processors)


def work() -> None:
    """Answers lines of JSON: a list of arguments prepares a group of calls, a name measures one."""
    import lasp

    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints
    print(lasp.__file__, file=answers)
    calls: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, list):
            calls.clear()
            gc.collect()
            pin(processors)
            calls |= kernel_calls(*asked[1:]) if asked[0] == "kernels" else host_calls(*asked[1:])
            if asked[0] == "host":  # one for all processes, which never measure at once
                pin({max(processors, default=0)})
                gc.freeze()  # to collect all that was loaded takes longer than a round
            print("null", file=answers)
        else:
            print(json.dumps(calls[asked]()), file=answers)


class Revision:
    """A process with `lasp` of one checkout."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.source = str(folder.resolve() / "src")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([self.source, str(HERE)]),
            "TRITON_CACHE_DIR": str(cache),
            "PYTHONHASHSEED": "0",
        }
        command = [sys.executable, str(HERE / "compare.py"), "--worker"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> Revision:
        found = self._read()
        if not Path(found).is_relative_to(self.source):
            self.__exit__()
            raise RuntimeError(f"expected lasp from {self.source}, got {found}")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.source} ended with exit code {self._process.wait()}")
        return line.strip()

    def ask(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")

    def answer(self) -> Any:
        return json.loads(self._read())


def compile_side_by_side(sets: list[list[Revision]], groups: list[list[Any]]) -> None:
    """Has each group compiled in a process of each folder that has no other to compile, as far as there are any."""
    asked = []
    for group, revisions in zip(groups, itertools.cycle(sets), strict=False):
        for revision in {revision.source: revision for revision in revisions}.values():
            revision.ask(group)
            asked.append(revision)
    for revision in asked:
        revision.answer()


def prepare(revisions: list[Revision], group: list[Any]) -> None:
    for revision in revisions:  # compiling side by side
        revision.ask(group)
    for revision in revisions:
        revision.answer()


def measure(revisions: list[Revision], part: str, rounds: int) -> list[list[float]]:
    """Returns the milliseconds of each revision by round."""
    times: list[list[float]] = [[] for _ in revisions]
    for number in range(rounds + 1):
        places = range(len(revisions)) if number % 2 == 0 else reversed(range(len(revisions)))
        for place in places:
            revisions[place].ask(part)
            found = revisions[place].answer()
            if number > 0:  # the first warms up
                times[place].append(found)
    return times


@contextlib.contextmanager
def checkouts(revisions: list[str]) -> Iterator[list[Path]]:
    """Gives a folder for each revision: itself if it is one, or what git has of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for revision in revisions:
            folder = Path(revision)
            if not folder.is_dir():
                folder = Path(temporary) / revision.replace("/", "-")
                folder.mkdir(exist_ok=True)
                packed = subprocess.run(
                    ["git", "-C", HERE.parent, "archive", revision], check=True, stdout=subprocess.PIPE
                )
                subprocess.run(["tar", "x", "-C", folder], input=packed.stdout, check=True)
            folders.append(folder)
        yield folders


def table(rows: list[Compared], limit: float) -> None:
    for row in rows:
        beyond = "  beyond" if slower([row], limit) else ""
        numbers = f"{row.a:9.3f}{row.b:9.3f}{row.ratio:8.3f}{row.least:8.3f}{row.most:8.3f}"
        print(f"{row.name:44}{row.revision[-26:]:28}{numbers}{beyond}", flush=True)


def compare(folders: list[Path], options: argparse.Namespace) -> list[Compared]:
    kernels: list[tuple[list[Any], tuple[str, ...], int]]
    kernels = [(["kernels", shape, kind], KERNEL_PARTS, 1) for shape in options.shapes for kind in options.kinds]
    host: list[tuple[list[Any], tuple[str, ...], int]]
    host = [(["host", kind, options.stubbed], HOST_PARTS, options.processes) for kind in options.host_kinds]
    rows: list[Compared] = []
    print(f"{'':72}{'A ms':>9}{'B ms':>9}{'B / A':>8}{'least':>8}{'most':>8}")
    with contextlib.ExitStack() as stack:
        caches = stack.enter_context(tempfile.TemporaryDirectory())
        started = [
            [Revision(folder, Path(caches) / str(folders.index(folder))) for folder in folders]
            for _ in range(options.processes if host else 1)
        ]
        sets = [[stack.enter_context(revision) for revision in revisions] for revisions in started]
        compile_side_by_side(sets, [group for group, *_ in host])
        for group, parts, count in [*kernels, *host]:
            for revisions in sets[:count]:
                prepare(revisions, group)
            for part in parts:
                of_host = group[0] == "host"
                times: list[list[float]] = [[] for _ in folders]
                for revisions in sets[:count]:
                    for known, found in zip(times, measure(revisions, part, options.rounds), strict=True):
                        known += [min(found)] if of_host else found
                typical = min if of_host else statistics.median
                name = f"{' '.join(group[:2] if of_host else group)}: {part}"
                row = [
                    compared(name, revision, times[0], found, typical)
                    for revision, found in zip(options.revisions, times, strict=True)
                ]
                rows += row[1:]
                table(row[1:], options.limit)
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", metavar="REV", help="the base, and those that are compared with it")
    parser.add_argument("--shapes", nargs="*", default=["main"], help="of benchmarks/kernels.py")
    parser.add_argument("--kinds", nargs="*", default=["constant", "scalar", "channel"], help="likewise")
    parser.add_argument("--host-kinds", nargs="*", default=list(HOST_KINDS), help="of the host's rows")
    parser.add_argument("--stubbed", action="store_true", help="the host's rows alone, with launches that do nothing")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=6, help="of each revision, for the host's rows")
    parser.add_argument("--limit", type=float, default=1.02, help="of a ratio B / A")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker and len(options.revisions) < 2:
        parser.error("expected at least two revisions or folders")
    if options.stubbed:
        options.shapes = []
    return options


def main() -> int:
    options = parsed()
    if options.worker:
        work()
        return 0
    with checkouts(options.revisions) as folders:
        rows = compare(folders, options)
    bad = slower(rows, options.limit)
    if options.output is not None:
        import torch
        import triton

        device = "CPU, launches stubbed" if options.stubbed else torch.cuda.get_device_name()
        result = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        result |= {"revisions": options.revisions, "rounds": options.rounds, "processes": options.processes}
        result |= {"limit": options.limit, "rows": [row._asdict() for row in rows]}
        options.output.write_text(json.dumps(result, indent=1))
    print(f"{len(bad)} of {len(rows)} rows beyond {options.limit}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
