"""The configurations that test_gpu.py runs, and that they reach every way a plan has of moving chunks.

Apart from it, since plans are made without a GPU and are checked without one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lasp.kernels.limits import FUSED_MAX_DIM
from lasp.kernels.triton.common import decays
from lasp.kernels.triton.common.device import DeviceLimits
from lasp.kernels.triton.decay.launches import RunShape
from lasp.kernels.triton.decay.plan import plan
from lasp.kernels.triton.decay.scalar.grouped.launches import takes_groups
from lasp.kernels.triton.decay.scalar.launches import ScalarLaunches

# What the cases are planned for where they name no processors: an H100 or H200.
HOPPER = DeviceLimits(132, 232448, True)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("none", "constant", "scalar", "channel")
DECAYS = dict(zip(KINDS, (decays.NONE, decays.HEAD, decays.TOKEN, decays.CHANNEL), strict=True))


class Bounds(NamedTuple):
    """Bounds of relative errors. A constant's d_g, one number a head, sums terms of all tokens, which cancel."""

    outputs: float
    gradients: float
    d_constant: float


BOUNDS = {
    BF16: Bounds(5e-3, 8e-3, 5e-2),
    FP16: Bounds(1.5e-3, 1.5e-3, 1e-2),
    FP32: Bounds(2e-6, 2e-6, 2e-5),
}


class Case(NamedTuple):
    kind: str
    dtype: torch.dtype
    K: int
    V: int
    T: int = 2131
    H: int = 2
    H_v: int = 4
    B: int = 1
    gates: str = "weak"
    processors: int | None = 8
    initial: bool = True
    documents: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shown = "-".join(str(value).removeprefix("torch.") for value in self[:-1])
        return shown if self.documents is None else f"{shown}-packed"

    @property
    def states(self) -> int:
        return self.B if self.documents is None else len(self.documents) - 1


# On the device's own processors.
WHOLE: dict[str, Any] = {"T": 4133, "H": 16, "H_v": 32, "processors": None}
SHORT: dict[str, Any] = {"T": 333, "B": 2, "processors": None}
# Without an initial state: sweeps gather the states of segments; of gates per channel there is one segment.
GATHERED: dict[str, Any] = {"T": 473, "H": 4, "B": 2, "processors": None, "initial": False}
# Of heads of their own, decays that are not learned: so long that dk and dv are made in one launch.
UNLEARNED = [*((kind, 128) for kind in KINDS[:3]), *(("constant", D) for D in (64, 256, 512))]
PAIRED: dict[str, Any] = {"T": 8186, "H": 4}
# Packed: documents of several segments, one of a single token, an empty one; short ones, many a segment's length.
LONG_DOCUMENTS: dict[str, Any] = {"T": 3003, "documents": (0, 1500, 1500, 3002, 3003)}
SHORT_DOCUMENTS: dict[str, Any] = {"T": 333, "documents": (0, 1, 1, 70, 199, 333), "processors": None}
SHARED: dict[str, Any] = {"T": 4133, "H": 2, "H_v": 16, "B": 2}
GROUPED = ((128, 64), (64, 64), (128, 128))
CASES = [
    # 16 bits, chunks by descriptors and by pointers; every class of dims that the plan tells apart.
    *(Case(kind, BF16, D, D) for kind in KINDS for D in (64, 128, 256)),
    *(Case(kind, BF16, 128, 128, **WHOLE) for kind in KINDS),
    *(Case(kind, BF16, D, D, **SHORT) for kind in KINDS for D in (64, 128, 256)),
    *(Case(kind, FP16, D, D, **SHORT) for kind in KINDS for D in (64, 128, 256)),
    *(Case(kind, FP32, D, D, **SHORT) for kind in KINDS for D in (64, 128, 256)),
    # Dims that fill no tile, one whose rows descriptors cannot take (100), and K unlike V.
    *(Case(kind, BF16, D, D) for kind in KINDS[1:] for D in (48, 80, 96, 100, 192)),
    *(Case(kind, dtype, 100, 48, **SHORT) for kind in ("scalar", "channel") for dtype in (FP16, FP32)),
    *(Case(kind, BF16, K, V) for kind in KINDS[1:] for K, V in ((64, 256), (128, 64))),
    *(Case(kind, BF16, 128, 128, **documents) for kind in KINDS for documents in (LONG_DOCUMENTS, SHORT_DOCUMENTS)),
    *(Case(kind, BF16, 256, 64, **LONG_DOCUMENTS) for kind in KINDS),
    *(Case(kind, dtype, 64, 64, **SHORT_DOCUMENTS) for kind in KINDS for dtype in (FP16, FP32)),
    # Cut: values alone, keys too, into parts that fill no tile and those that do.
    *(Case(kind, BF16, 256, 512) for kind in KINDS if kind != "constant"),
    *(Case(kind, BF16, 300, 520, **LONG_DOCUMENTS) for kind in KINDS),
    *(Case(kind, dtype, 512, 264, **SHORT) for kind in KINDS for dtype in (FP16, FP32)),
    # Wide heads in fp32, of which a compiler got one wrong: no multiple of its columns, documents of several segments.
    *(Case(kind, FP32, 256, V, H=1, H_v=3, **LONG_DOCUMENTS) for kind in KINDS[1:] for V in (112, 256)),
    *(Case(kind, BF16, D, D, **GATHERED) for kind in KINDS for D in (48, 64, 100, 128, 256)),
    *(Case(kind, dtype, 64, 64, **GATHERED | {"T": 243}) for kind in KINDS for dtype in (FP16, FP32)),
    Case("channel", FP32, 64, 64, **GATHERED | {"T": 115}),
    *(Case(kind, BF16, K, V, **GATHERED) for kind in KINDS[:3] for K, V in ((64, 256), (128, 64))),
    *(Case(kind, BF16, 128, 128, **SHORT_DOCUMENTS, initial=False) for kind in KINDS),
    *(Case(kind, BF16, 64, 64, **GATHERED, gates="strong") for kind in KINDS[1:3]),
    # Gates from 0 to -20, and none at all.
    *(Case(kind, dtype, 64, 64, **SHORT, gates="strong") for kind in KINDS[1:] for dtype in BOUNDS),
    *(Case(kind, BF16, 128, 128, gates="strong") for kind in KINDS[1:]),
    Case("channel", BF16, 128, 128, gates="strongest"),
    # Heads that share q and k, summed inside: by descriptors, of two sequences and an odd number of chunks.
    *(Case("scalar", BF16, K, V, **SHARED, gates=gates) for K, V in GROUPED for gates in ("weak", "strong")),
    *(Case(kind, dtype, 64, 64, **SHORT, gates="zero") for kind in KINDS[1:] for dtype in BOUNDS),
]


def ways_of(cases: list[Case]) -> set[tuple[object, ...]]:
    """Returns how plans move the chunks of cases: by states that are gathered, by descriptors, in several segments."""
    ways: set[tuple[object, ...]] = set()
    for case in cases:
        heads, kind = case.B * case.H_v, DECAYS[case.kind].value
        limits = HOPPER._replace(processors=case.processors or HOPPER.processors)
        p = plan(case.T, heads, case.K, case.V, case.dtype, kind, *limits, not case.initial)
        ways.add((case.kind, case.dtype, p.gathers, p.descriptors, p.segments > 1))
    return ways


def test_the_cases_reach_every_way_of_moving_chunks() -> None:
    """Read from states by descriptors and by pointers; gathered, by sweeps of several segments but per channel."""
    read = {(BF16, False, True, True), (BF16, False, False, True), (FP16, False, False, True)}
    wanted: set[tuple[object, ...]] = {(kind, *way) for kind in KINDS for way in read}
    wanted |= {(kind, dtype, True, False, kind != "channel") for kind in KINDS for dtype in BOUNDS}
    assert wanted <= ways_of(CASES)
    # The control: what starts from a state gathers none.
    assert wanted - ways_of([case for case in CASES if case.initial]) == {way for way in wanted if way[2]}


def test_the_cases_reach_heads_that_share_keys() -> None:
    def summed_inside(case: Case) -> bool:
        kind, limits = DECAYS[case.kind].value, HOPPER._replace(processors=case.processors or HOPPER.processors)
        q, v = (case.B, case.T, case.H, case.K), (case.B, case.T, case.H_v, case.V)
        p = plan(case.T, case.B * case.H_v, case.K, case.V, case.dtype, kind, *limits, False)
        return takes_groups(RunShape(q, v, case.dtype, kind, True, 1.0), p, True, limits.processors) and p.descriptors

    found = [case for case in CASES if case.documents is None and summed_inside(case)]
    assert {(case.K, case.V) for case in found} == set(GROUPED)
    assert not any(summed_inside(case._replace(H=4)) for case in found)  # the control: of four heads each


def test_long_runs_are_paired() -> None:
    def paired(kind: str, D: int, T: int) -> bool:
        width, shape = min(D, FUSED_MAX_DIM), PAIRED | {"T": T}
        q = (1, shape["T"], shape["H"], width)
        p = plan(T, shape["H"], width, width, BF16, DECAYS[kind].value, 8, *HOPPER[1:], False)
        return ScalarLaunches(RunShape(q, q, BF16, DECAYS[kind].value, False, 1.0), p).paired

    assert all(paired(*head, PAIRED["T"]) for head in UNLEARNED)
    assert not any(paired(*head, PAIRED["T"] // 8) for head in UNLEARNED)  # the control: shorter ones are not
