"""Two revisions of the decay family's kernels in turns in one run on one GPU: is the second as fast?

    python benchmarks/compare.py REV_A REV_B                                 # of this repository, in worktrees
    python benchmarks/compare.py --folder-a OLD --folder-b NEW --output FILE   # two checkouts, without git

A process for each revision is kept, with `lasp` from its checkout and the measuring code of this folder. Each row of
`benchmarks/kernels.py` (kernels alone, by CUDA graphs; and eager calls) and of `benchmarks/host_cost.py` both measure
in turns, A B, B A, and so on, so that neither has the cooler device. Printed are both medians, the median of the
rounds' ratios B / A, and the least and the most of them. Exit code 1 where a median ratio is beyond the limit. Host
times differ from process to process: both have the same processors, take the least of a round instead of its median,
and are started anew `--restarts` times, over which rounds are spread.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
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
KERNEL_KINDS = ("constant", "scalar", "channel")
HOST_KINDS = ("none", "constant", "scalar", "channel")
KERNEL_PARTS = ("forward, kernels", "both, kernels", "forward", "both")
PROCESSORS = 4  # the same for both revisions, which never work at once
HOST_PARTS = ("forward", "both", "both on one thread")


class Compared(NamedTuple):
    """A row: medians in ms, and the rounds' ratios B / A: their median, least and most."""

    name: str
    a: float
    b: float
    ratio: float
    least: float
    most: float


def compared(name: str, times_a: list[float], times_b: list[float]) -> Compared:
    ratios = [b / a for a, b in zip(times_a, times_b, strict=True)]
    a, b, ratio = (statistics.median(values) for values in (times_a, times_b, ratios))
    return Compared(name, a, b, ratio, min(ratios), max(ratios))


def slower(rows: list[Compared], limit: float) -> list[Compared]:
    """The rows beyond the limit; what is no number is."""
    return [row for row in rows if not row.ratio <= limit]


# In the process of a revision.


def kernel_calls(shape: str, kind: str) -> dict[str, Callable[[], float]]:
    """What gives milliseconds, by part."""
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


def host_calls(kind: str) -> dict[str, Callable[[], float]]:
    import host_cost
    import torch

    x = host_cost.inputs(kind)

    def one_thread() -> float:
        with torch.autograd.set_multithreading_enabled(False):
            return host_cost.host_milliseconds(lambda: host_cost.both(x, "triton"))["min"]

    return {
        "forward": lambda: host_cost.host_milliseconds(lambda: host_cost.forward(x, "triton"))["min"],
        "both": lambda: host_cost.host_milliseconds(lambda: host_cost.both(x, "triton"))["min"],
        "both on one thread": one_thread,
    }


def work() -> None:
    """Answers lines of JSON: a list of arguments prepares a group of calls, a name measures one."""
    import lasp

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-PROCESSORS:])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints
    print(lasp.__file__, file=answers)
    calls: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, list):
            calls.clear()
            gc.collect()
            calls |= kernel_calls(*asked[1:]) if asked[0] == "kernels" else host_calls(*asked[1:])
            print("null", file=answers)
        else:
            print(json.dumps(calls[asked]()), file=answers)


class Revision:
    """A process with `lasp` of one checkout."""

    def __init__(self, folder: Path, cache: Path) -> None:
        paths = [str(folder.resolve() / "src"), str(HERE)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)}
        command = [sys.executable, str(HERE / "compare.py"), "--worker"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        found = self._read()
        if not Path(found).is_relative_to(paths[0]):
            self.end()
            raise RuntimeError(f"expected lasp from {paths[0]}, got {found}")

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a revision's process ended with exit code {self._process.wait()}")
        return line.strip()

    def ask(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")

    def answer(self) -> Any:
        return json.loads(self._read())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


Times = dict[str, tuple[list[float], list[float]]]


def measure(a: Revision, b: Revision, group: list[str], parts: tuple[str, ...], rounds: int, times: Times) -> None:
    """Adds the milliseconds of both, by row and round."""
    for revision in (a, b):  # compiling side by side
        revision.ask(group)
    for revision in (a, b):
        revision.answer()
    for part in parts:
        of_a, of_b = times.setdefault(f"{' '.join(group)}: {part}", ([], []))
        for number in range(rounds + 1):
            found = {}
            for revision in (a, b) if number % 2 == 0 else (b, a):
                revision.ask(part)
                found[revision] = revision.answer()
            if number > 0:  # the first warms up
                of_a.append(found[a])
                of_b.append(found[b])


@contextlib.contextmanager
def checkouts(revisions: list[str]) -> Iterator[list[Path]]:
    """Worktrees of revisions of this repository."""
    git = ["git", "-C", str(HERE)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a", "b")]
        try:
            for path, revision in zip(paths, revisions, strict=True):
                subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(path), revision], check=True)
            yield paths
        finally:
            for path in paths:
                subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=False, capture_output=True)


def compare(folders: list[Path], options: argparse.Namespace) -> list[Compared]:
    kernels = [(["kernels", shape, kind], KERNEL_PARTS) for shape in options.shapes for kind in KERNEL_KINDS]
    host = [(["host", kind], HOST_PARTS) for kind in HOST_KINDS] if options.host else []
    times: Times = {}
    with tempfile.TemporaryDirectory() as cache:
        for start in range(options.restarts if host else 1):
            a, b = (Revision(folder, Path(cache) / name) for folder, name in zip(folders, "ab", strict=True))
            for group, parts in [*(kernels if start == 0 else []), *host]:
                measure(a, b, group, parts, options.rounds, times)
                print(f"measured {' '.join(group)}", file=sys.stderr, flush=True)
            a.end()
            b.end()
    rows = [compared(name, *pair) for name, pair in times.items()]
    print(f"{'':44}{'A ms':>9}{'B ms':>9}{'B / A':>8}{'least':>8}{'most':>8}")
    for row in rows:
        beyond = "  beyond" if slower([row], options.limit) else ""
        print(f"{row.name:44}{row.a:9.3f}{row.b:9.3f}{row.ratio:8.3f}{row.least:8.3f}{row.most:8.3f}{beyond}")
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", metavar="REV", help="two of them, unless folders are given")
    parser.add_argument("--folder-a", type=Path)
    parser.add_argument("--folder-b", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["main"], help="of benchmarks/kernels.py")
    parser.add_argument("--no-host", dest="host", action="store_false")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--restarts", type=int, default=4, help="of the processes, for the host's rows")
    parser.add_argument("--limit", type=float, default=1.02, help="of a median ratio B / A")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folders = [options.folder_a, options.folder_b]
    if not options.worker and (len(options.revisions), folders.count(None)) not in ((2, 2), (0, 0)):
        parser.error("expected two revisions, or --folder-a and --folder-b")
    return options


def main() -> int:
    options = parsed()
    if options.worker:
        work()
        return 0
    folders = [options.folder_a, options.folder_b]
    given = contextlib.nullcontext(folders) if not options.revisions else checkouts(options.revisions)
    with given as paths:
        rows = compare(paths, options)
    bad = slower(rows, options.limit)
    if options.output is not None:
        import torch
        import triton

        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        result |= {"limit": options.limit, "rounds": options.rounds, "rows": [row._asdict() for row in rows]}
        options.output.write_text(json.dumps(result, indent=1))
    print(f"{len(bad)} of {len(rows)} rows beyond {options.limit}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
