"""Tests against flash-linear-attention, installed into a folder of its own: `make oracle` runs them.

Importing it registers classes with other libraries and crashes some of them where there is no GPU, so the default
test environment does not have it, and without it there is nothing to collect here. Its kernels run in Triton's
interpreter, on the CPU.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator

collect_ignore_glob: list[str] = []

if importlib.util.find_spec("fla") is None:
    collect_ignore_glob.append("test_*.py")
else:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")

    import triton.language as tl
    from triton.runtime.autotuner import Autotuner

    # There is no device to time configurations on: the first will do.
    _init = Autotuner.__init__

    def _first_only(self, fn, arg_names, configs, *args, **kwargs):
        _init(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = _first_only
    Autotuner.do_bench = staticmethod(lambda function, quantiles=None, **options: [0.0, 0.0, 0.0])

    class _Index(int):
        """A loop variable with the cast that compiled ones have and the interpreter's lack."""

        def to(self, dtype):
            return tl.cast(int(self), dtype)

    def _range(*bounds) -> Iterator[_Index]:
        return map(_Index, builtins.range(*(int(bound) for bound in bounds)))

    for _name in ("common.chunk_delta_h", "kda.chunk_bwd", "gla.chunk"):
        importlib.import_module(f"fla.ops.{_name}").range = _range  # type: ignore[attr-defined]
