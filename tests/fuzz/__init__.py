"""Random calls of every operator against loops over tokens in fp64: `python -m tests.fuzz --device cuda --seconds 600`.

Needs PyTorch and Triton, and nothing that the tests need besides. A call is a *case*: a seed and an index decide all of
it (`cases`), so that one line runs it again, alone. Some cases run in one process, some on simulated ranks in one
process, some over gloo on 2 to 4 real ones. What is right is written here once more (`reference`), a few lines an
operator, on nothing of the library's; what is near enough, in `compare`. `pool` runs cases in processes of their own:
one that dies or hangs is reported and replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]
# What the tests share: tolerances, simulated ranks, and a faster interpreter.
for _folder in (_TESTS, _TESTS / "kernels" / "triton"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))
