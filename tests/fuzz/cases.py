"""A case: everything about one call, drawn from a seed and an index."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import select
from lasp.kernels.limits import FUSED_MIN_KEYS

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = {
    "decay": ("linear", "linear", "linear", "normalized"),
    "delta": ("delta",),
    "all": ("linear", "linear", "linear", "linear", "normalized", "delta", "delta", "convolution", "shift", "softmax"),
}
GATES = ("none", "constant", "scalar", "channel")
SCHEDULES = ("ring", "all_gather", "pipelined", "doubling", "all_to_all", "hierarchical", "reach", "auto")
DIMS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 100, 112, 128, 192, 250, 256)
# The strongest logarithm of a head's decays.
DECAYS = (0.0, 1e-7, 1e-4, 1e-3, 0.01, 0.1, 0.1, 1.0, 8.0, 50.0, 2000.0, float("inf"))
# Elements of all the states of all tokens, which is what a reference passes over; tokens of one that is a loop; and of
# one that holds every pair of tokens.
BUDGET = {"cpu": 4e7, "cuda": 6e9}
LOOP_TOKENS = {"cpu": 1500, "cuda": 6000}
PAIR_TOKENS = 400
# Kernels of the interpreter take a millisecond a program.
INTERPRETED_TOKENS, INTERPRETED_BUDGET = 200, 2e5
MAX_REAL_RANKS, MAX_SIMULATED_RANKS = 4, 8
# On a GPU compilation takes most of the time: cases of so many sorts, then as many of the same with other numbers.
SORTS, TIMES = 64, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        op, backend, gate, causal, dtype: what is called. fused: whether fused kernels run it. gate_dtype: of gates and
            betas.
        batch .. values: B, T, H, H_v / H, K and V; of a convolution K is its channels, of softmax V its values'.
        cu_seqlens: of packed documents, or None.
        decays: the strongest of each value head. spikes: the share of gates that are none at all, or as strong as any.
        beta: "any", or all of the same value.
        initial: "none", "given" or "learned". final: whether that is wanted.
        learned: of which inputs gradients are wanted. layout: how inputs lie in memory.
        lengths: tokens of every rank; None on one device. even: equal shards, without `lengths`.
        schedule, simulated: how ranks exchange, and whether in one process.
        width, bias, activation: of a convolution. method, window, softcap: of softmax attention. normalize: of
            the delta rule.
        seed: of the numbers.
    """

    op: str
    backend: str
    fused: bool
    gate: str
    causal: bool
    dtype: str
    gate_dtype: str
    batch: int
    tokens: int
    heads: int
    groups: int
    keys: int
    values: int
    cu_seqlens: tuple[int, ...] | None
    decays: tuple[float, ...]
    spikes: float
    beta: str
    scale: float | None
    initial: str
    final: bool
    learned: str
    layout: str
    lengths: tuple[int, ...] | None
    even: bool
    schedule: str
    simulated: bool
    width: int
    bias: bool
    activation: str | None
    method: str
    normalize: bool
    seed: int
    window: int | None = None
    softcap: float | None = None

    @property
    def real_ranks(self) -> int:
        return 1 if self.lengths is None or self.simulated else len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        if self.cu_seqlens is None:
            return self.tokens
        return max(b - a for a, b in pairwise(self.cu_seqlens))

    @property
    def is_recurrence(self) -> bool:
        return self.op in ("linear", "normalized", "delta")

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self) if field.name != "seed")


def draw(seed: int, index: int, device: str, family: str) -> Case:
    """The case of this index."""
    rng = random.Random(f"{seed}:{index}")
    sort = rng  # draws what kernels are compiled for
    if device == "cuda":
        sort = random.Random(f"{seed}:sort {index // (SORTS * TIMES) * SORTS + index % SORTS}")
    op = sort.choice(FAMILIES[family])
    causal = op in ("delta", "convolution", "shift") or sort.random() < 0.85
    gate = sort.choice(GATES) if op in ("linear", "normalized") and causal else "none"
    gate = sort.choice(("none", "scalar", "channel")) if op == "delta" else gate
    dtype = sort.choice(("fp64", "fp32", "fp32", "fp32", "bf16", "bf16", "bf16", "fp16"))
    backend = _backend(sort, op, causal, device)
    if backend == "triton" and dtype == "fp64":
        dtype = "fp32"
    tokens = _tokens(rng, device)
    if op == "softmax":
        tokens = min(tokens, PAIR_TOKENS)
    elif op == "delta":
        tokens = min(tokens, LOOP_TOKENS[device])
    if backend == "reference":
        tokens = min(tokens, 40)
    heads, groups, batch = rng.choice((1, 1, 2, 3, 4)), sort.choice((1, 1, 1, 2, 3)), rng.choice((1, 1, 2, 3))
    keys, values = sort.choice(DIMS), sort.choice(DIMS)
    if op == "normalized":
        values = min(values, 255)
    budget = BUDGET[device]
    if device == "cpu" and backend == "triton":
        tokens, budget = min(tokens, INTERPRETED_TOKENS), INTERPRETED_BUDGET
    tokens = tokens if op != "delta" or keys * values <= 16384 else min(tokens, LOOP_TOKENS[device] // 3)
    while tokens * batch * heads * groups * keys * values > budget:
        if batch * heads * groups > 1:
            batch, heads, groups = max(1, batch - 1), max(1, heads - 1), max(1, groups - 1)
        elif keys * values > 64:
            keys, values = max(1, keys // 2), max(1, values // 2)
        else:
            tokens //= 2
    if op == "delta" and backend == "triton" and keys < FUSED_MIN_KEYS:
        backend = "auto"
    fused = causal and _chosen(op, backend, dtype, gate, keys, device) == "triton"
    cu_seqlens = None
    if (causal or op == "softmax") and sort.random() < 0.45:
        batch, cu_seqlens = 1, (0, *_cuts(rng, tokens, rng.choice((1, 2, 3, 6, 12))), tokens)
    lengths, even, simulated, schedule = _ranks(rng, sort, tokens, device, backend)
    method = rng.choice(("all_gather", "ulysses"))
    if op == "softmax" and method == "ulysses" and lengths is not None:
        heads, groups = heads * len(lengths), 1
    learned = sort.choice(("all", "all", "all", "all", "no gate", "no gate", "queries", "nothing"))
    return Case(
        op=op, backend=backend, fused=fused, gate=gate, causal=causal, dtype=dtype,
        gate_dtype=rng.choice((dtype, "fp32", "fp32", "fp64")),
        batch=batch, tokens=tokens, heads=heads, groups=groups, keys=keys, values=values, cu_seqlens=cu_seqlens,
        decays=tuple(rng.choice(DECAYS) for _ in range(heads * groups)),
        spikes=rng.choice((0.0, 0.0, 0.1)),
        beta=rng.choice(("any", "any", "any", "0", "1", "2")),
        scale=rng.choice((None, None, 1.0, 0.3, -0.5)),
        initial=sort.choice(("none", "given", "learned", "learned")),
        final=sort.random() < 0.7, learned=learned,
        layout=rng.choice(("plain", "plain", "heads first", "a part", "every other", "expanded")),
        lengths=lengths, even=even, schedule=schedule, simulated=simulated,
        width=rng.randint(1, 8), bias=rng.random() < 0.5, activation=rng.choice((None, "silu")), method=method,
        # Of one channel nothing is left of the length's gradient.
        normalize=op == "delta" and keys > 1 and sort.random() < 0.5, seed=rng.getrandbits(48),
        # Of one key nothing is left of the query's gradient.
        window=rng.choice((None, None, 2, 5, 70)) if op == "softmax" and causal else None,
        softcap=rng.choice((None, None, None, 3.0)) if op == "softmax" else None,
    )  # fmt: skip


def _backend(rng: random.Random, op: str, causal: bool, device: str) -> str:
    if op in ("convolution", "shift"):
        return "torch"
    if op == "softmax":
        return rng.choice(("auto", "reference"))
    if op == "delta":
        return rng.choice(("auto", "torch", *(("torch",) * 2 if device == "cpu" else ("triton",) * 2), "reference"))
    if not causal:
        return rng.choice(("auto", "torch", "torch", "torch", "reference"))
    if device == "cuda":
        return rng.choice(("triton", "triton", "triton", "triton", "auto", "auto", "torch", "reference"))
    return rng.choice(("torch", "torch", "torch", "torch", "reference", "triton"))


def _chosen(op: str, backend: str, dtype: str, gate: str, keys: int, device: str) -> str:
    """Returns the backend that runs a call: of "auto" the library's choice."""
    if backend != "auto" or op not in ("linear", "normalized", "delta"):
        return backend
    family, wide = ("delta", keys) if op == "delta" else ("decay", 0)
    return select._choose(family, torch.device(device), DTYPES[dtype], wide, gate == "channel")


def _tokens(rng: random.Random, device: str) -> int:
    kind = rng.random()
    if kind < 0.12:
        return rng.choice((0, 1, 1, 2))
    if kind < 0.4:
        return rng.randint(2, 70)
    if kind < (0.9 if device == "cpu" else 0.6):
        return rng.choice((rng.randint(60, 68), rng.randint(120, 135), rng.randint(70, 300)))
    if kind < (0.98 if device == "cpu" else 0.85):
        return rng.randint(300, 2500)
    return rng.randint(2500, 20000)


def _cuts(rng: random.Random, whole: int, parts: int) -> list[int]:
    """Draws where to cut into so many parts: anywhere, now and then at a place cut before, or a token beside it."""
    cuts: list[int] = []
    for _ in range(parts - 1):
        cut = rng.randint(0, whole)
        if cuts and rng.random() < 0.3:
            cut = min(whole, rng.choice(cuts) + rng.randint(0, 1))
        cuts.append(cut)
    return sorted(cuts)


def _ranks(
    rng: random.Random, sort: random.Random, tokens: int, device: str, backend: str
) -> tuple[tuple[int, ...] | None, bool, bool, str]:
    """lengths, even, simulated and schedule."""
    if sort.random() < 0.5 or (device == "cpu" and backend == "triton" and rng.random() < 0.7):
        return None, False, False, "none"
    simulated = device == "cuda" or rng.random() < 0.3
    size, schedule = rng.randint(2, MAX_SIMULATED_RANKS if simulated else MAX_REAL_RANKS), rng.choice(SCHEDULES)
    if tokens % size == 0 and rng.random() < 0.3:
        return (tokens // size,) * size, True, simulated, schedule
    cuts = [0, *_cuts(rng, tokens, size), tokens]
    return tuple(b - a for a, b in pairwise(cuts)), False, simulated, schedule


@dataclass(frozen=True)
class Problem:
    """The global inputs of a case, by the operator's names, and the gradients of its outputs and final states."""

    inputs: dict[str, Tensor | None]
    d_o: Tensor
    d_final: Tensor


def make(case: Case, device: torch.device) -> Problem:
    """The numbers of a case: drawn on the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype, state_dtype = DTYPES[case.dtype], torch.float64 if case.dtype == "fp64" else torch.float32
    B, T, H, H_v, K, V = case.batch, case.tokens, case.heads, case.heads * case.groups, case.keys, case.values
    states = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: dict[str, Tensor | None]
    if case.op in ("convolution", "shift"):
        width = case.width - 1 if case.op == "convolution" else 1
        state = (states, K, width) if case.op == "convolution" else (states, K)
        inputs, d_o, state_dtype = {"x": normal(B, T, K)}, normal(B, T, K), dtype
        if case.op == "convolution":
            inputs |= {"weight": normal(K, case.width), "bias": normal(K) if case.bias else None}
        start, d_final = normal(*state), normal(*state)
    elif case.op == "softmax":
        # Here the keys have the fewer heads. Every document has some tokens before its first.
        kept = 0 if case.initial == "none" else 2 * states if case.cu_seqlens is not None else 2
        after = kept + T
        inputs = {"q": normal(B, T, H_v, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
        start, d_final, state_dtype = normal(B, kept, H, K + V), normal(B, after, H, K + V), dtype
        d_o = normal(B, T, H_v, V)
    else:
        inputs = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H_v, V)}
        columns = V + 1 if case.op == "normalized" else V
        start, d_final, d_o = normal(states, H_v, K, columns), normal(states, H_v, K, columns), normal(B, T, H_v, V)
        if case.op == "normalized":
            inputs |= {name: inputs[name].abs() + 0.1 for name in "qk"}
            start = torch.cat([start[..., :-1], start[..., -1:].abs() + 0.1], -1)
        if case.op == "delta":
            if not case.normalize:  # a little short, so that none is too long for having been rounded
                inputs["k"] = 0.995 * torch.nn.functional.normalize(inputs["k"], dim=-1)
                if K == 1 and case.dtype in ("fp64", "fp32"):
                    inputs["k"] = inputs["k"].sign()
            beta = 2 * torch.rand(B, T, H_v, generator=generator, dtype=torch.float64)
            inputs["beta"] = (beta if case.beta == "any" else torch.full_like(beta, float(case.beta))).clamp(0, 2)
        inputs["g"] = _gates(case, generator)
    gate_dtype = DTYPES[case.gate_dtype]
    inputs = {
        name: None if t is None else _laid_out(t, case, device, gate_dtype if name in ("g", "beta") else dtype)
        for name, t in inputs.items()
    }
    inputs["initial_state"] = None if case.initial == "none" else start.to(device, state_dtype)
    return Problem(inputs, _laid_out(d_o, case, device, dtype), d_final.to(device, state_dtype))


def _gates(case: Case, generator: torch.Generator) -> Tensor | None:
    H_v = case.heads * case.groups
    shape = {
        "none": None, "constant": (H_v,), "scalar": (case.batch, case.tokens, H_v),
        "channel": (case.batch, case.tokens, H_v, case.keys),
    }[case.gate]  # fmt: skip
    if shape is None:
        return None
    size = torch.rand(shape, generator=generator, dtype=torch.float64)
    strongest = torch.tensor(case.decays, dtype=torch.float64)
    strongest = strongest[:, None] if case.gate == "channel" else strongest
    g = torch.where(strongest == 0, 0.0, -strongest * size)
    if case.gate != "constant" and case.spikes > 0:
        spike = torch.rand(shape, generator=generator, dtype=torch.float64)
        g = torch.where(spike < case.spikes / 2, 0.0, g)
        g = torch.where(spike > 1 - case.spikes / 2, -50.0, g)
        g = torch.where(spike > 1 - case.spikes / 8, -torch.inf, g)
    return g


def _laid_out(tensor: Tensor, case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as asked for, in the case's layout."""
    tensor = tensor.to(device, dtype)
    if tensor.dim() < 3:
        return tensor
    if case.layout == "heads first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if case.layout == "a part":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, device=device, dtype=dtype)
        wide[..., 3:-2] = tensor
        return wide[..., 3:-2]
    if case.layout == "every other":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, device=device, dtype=dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if case.layout == "expanded":
        return tensor[:, :, :1].expand(*tensor.shape)
    return tensor


def options(case: Case) -> dict[str, Any]:
    """The operator's keyword arguments, but for tensors and ranks."""
    found: dict[str, Any] = {"output_final_state": case.final, "cu_seqlens": case.cu_seqlens}
    if case.op == "convolution":
        found["activation"] = case.activation
    if case.is_recurrence or case.op == "softmax":
        found |= {"scale": case.scale, "backend": case.backend}
    if case.op in ("linear", "normalized", "softmax"):
        found["causal"] = case.causal
    if case.op == "delta":
        found["normalize_qk"] = case.normalize
    if case.op == "softmax":
        found |= {"method": case.method, "window": case.window, "softcap": case.softcap}
        if case.cu_seqlens is not None and case.initial != "none":
            found["initial_cu_seqlens"] = tuple(2 * n for n in range(len(case.cu_seqlens)))
    return found
