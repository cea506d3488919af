"""`python -m tests.fuzz --help`"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import count, islice

import torch

from .cases import FAMILIES
from .pool import Draw, Outcome, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases asked for, and tells what was found; gives the exit code, 1 for a finding."""
    options = _parser().parse_args(arguments)
    if options.case is not None:
        seed, _, index = options.case.partition(":")
        one = Draw(int(seed), int(index), options.device, options.family)
        draws, most = iter([one]), 1
        print(one, one.case, sep="\n", flush=True)
    else:
        seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
        draws = (Draw(seed, index, options.device, options.family) for index in count())
        draws, most = (draws if options.cases is None else islice(draws, options.cases)), options.processes
        print(f"seed {seed}, device {options.device}, family {options.family}, {most} processes", flush=True)
    start = time.monotonic()
    limit_s = float("inf") if options.seconds is None else options.seconds
    cases: Counter[str] = Counter()
    found: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    with contextlib.suppress(KeyboardInterrupt):
        for outcome in run(draws, options.device, most, lambda: time.monotonic() - start > limit_s):
            if outcome.found is None:
                print(f"not finished after {outcome.seconds:.0f} s: {outcome.draw}", flush=True)
                continue
            kind = _kind(outcome)
            cases[kind] += 1
            seconds[kind] += outcome.seconds
            if outcome.found:
                found[kind] += 1
                print(_told(outcome), flush=True)
    for kind in sorted(cases):
        print(f"{kind:<40} {cases[kind]:>6} cases {found[kind]:>4} findings {seconds[kind] / cases[kind]:>7.1f} s each")
    print(f"{cases.total()} cases in {time.monotonic() - start:.0f} s, {found.total()} findings")
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=sys.modules[__package__].__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds",
        type=float,
        help="begin no case after so many, and end within half a minute; without --cases, for ever",
    )
    parser.add_argument("--cases", type=int, help="so many, and no more")
    parser.add_argument("--seed", type=int, help="of the cases; drawn, and printed, if not given")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="side by side, one for a CPU")
    parser.add_argument("--case", metavar="SEED:INDEX", help="this one alone")
    return parser


def _kind(outcome: Outcome) -> str:
    case = outcome.draw.case
    where = "one process" if case.lengths is None else "simulated ranks" if case.simulated else "real ranks"
    return f"{case.op}, {'fused' if case.fused else case.backend}, {where}"


def _told(outcome: Outcome) -> str:
    assert outcome.found is not None
    lines = [f"FOUND after {outcome.seconds:.0f} s: {outcome.draw}", f"    {outcome.draw.case}"]
    return "\n".join(lines + [f"    {line}" for text in outcome.found for line in text.splitlines()])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it is told what was found, as with an interrupt
    sys.exit(main())
