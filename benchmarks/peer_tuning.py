"""Compiles what a peer's tuning will try, in parallel: flash-linear-attention compiles some 160 configurations, one
after another, in minutes.

`benchmarks/kernels.py --peers fla` calls `compile_all` first. Each process is given a part of every kernel's
configurations, runs one forward and backward pass, and leaves its binaries in Triton's cache. The measuring process
then tunes over all of them, as the peer does by itself, and finds them compiled.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# As long as makes a tuned kernel's key and specialisation those of a longer run, and no longer.
TOKENS = 8192


def compile_all(peer: str, shapes: Sequence[str], kinds: Sequence[str]) -> None:
    """Fill Triton's cache."""
    parts = max(1, (os.cpu_count() or 1) - 2)
    command = [sys.executable, __file__, peer, ",".join(shapes), ",".join(kinds)]
    # A tuning over a part must not be kept.
    environment = os.environ | {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
    processes = [subprocess.Popen([*command, str(part), str(parts)], env=environment) for part in range(parts)]
    for process in processes:
        process.wait()


def take_part(part: int, parts: int) -> None:
    """Tuners made from now on know every `parts`-th of their configurations, one at least."""
    from triton.runtime.autotuner import Autotuner

    made = Autotuner.__init__

    def of_part(self, fn, arg_names, configs, *args, **kwargs):  # type: ignore[no-untyped-def]
        made(self, fn, arg_names, configs[part::parts] or configs[:1], *args, **kwargs)

    Autotuner.__init__ = of_part


def main() -> None:
    peer, shapes, kinds, part, parts = sys.argv[1:]
    take_part(int(part), int(parts))
    sys.path.insert(0, str(Path(__file__).parent))
    import kernels

    for shape in shapes.split(","):
        for kind in kinds.split(","):
            batch, tokens, heads, dim = kernels.SHAPES[shape]
            x = kernels.inputs((batch, min(tokens, TOKENS), heads, dim), kind)
            # What a peer refuses is a result, which the measuring process writes down.
            with contextlib.suppress(Exception):
                kernels.step(kernels.IMPLEMENTATIONS[peer], x)


if __name__ == "__main__":
    main()
