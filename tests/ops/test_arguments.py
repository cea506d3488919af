"""Whatever is passed where it does not belong: a ValueError that names the argument, of every public function."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from world import run

import lasp
from lasp.generate import generate, prefill
from lasp.layers import ConstantDecay
from lasp.models import CausalLM, preset
from lasp.models.loss import cross_entropy_sum
from lasp.parallelize import parallelize

META, NAN, INF = torch.zeros(1, 8, 2, 4, device="meta"), float("nan"), float("inf")
with FakeTensorMode():
    FAKE = torch.zeros(1, 8, 2, 4)
# No argument below takes one of these.
NEVER: tuple[Any, ...] = (
    "x",
    [1.0, "x"],
    object(),
    1j,
    torch.zeros(3, 3, 3, 3, 3),
    META,
    FAKE,
    torch.eye(4).to_sparse(),
)
TENSOR = (*NEVER, 1.0, True, [0.5], torch.zeros(1, 8, 2, 4, dtype=torch.bool), torch.zeros(0))
MISSING = (*TENSOR, None)
NUMBER = (*NEVER, True, "1", NAN, INF, [1.0], torch.ones((), requires_grad=True), torch.ones(2))
FLAG = (*NEVER, 0, 1, "False", None)
CU_SEQLENS = (
    *NEVER, 8, 8.0, True, "08", [0, 3.7, 8], [0.0, 8.0], ["0", "8"], [False, 8], [], [8], [0, 7], [0, 5, 3, 8],
    torch.tensor([0.0, 8.0]), torch.tensor([[0, 8]]), torch.tensor(8), torch.tensor([False, True]),
)  # fmt: skip
HEADS = {"q": torch.zeros(1, 8, 2, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4)}
OPERATOR = {
    "q": MISSING, "k": MISSING, "v": MISSING, "scale": NUMBER, "initial_state": TENSOR, "output_final_state": FLAG,
    "cu_seqlens": CU_SEQLENS, "sp": (*NEVER, 1, True), "backend": (*NEVER, None, 1),
}  # fmt: skip
LINEAR = {**OPERATOR, "q": (*MISSING, lambda: None, lambda: torch.zeros(3)), "g": TENSOR, "causal": FLAG}
HALO = {"x": MISSING, "initial_state": TENSOR, **{n: OPERATOR[n] for n in ("output_final_state", "cu_seqlens", "sp")}}
IDS = torch.zeros(1, 8, dtype=torch.int64)
BAD_IDS = (*MISSING, IDS.int(), IDS + 0.5, IDS - 1, IDS + 257, IDS[0, 0])
COUNT = (*NEVER, 0.5, "3", -1, True, NAN)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return CausalLM(preset("mamba2", "tiny", num_layers=1))


Case = tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "linear_attention": (lasp.linear_attention, HEADS, LINEAR),
    "normalized_linear_attention": (lasp.normalized_linear_attention, HEADS, {**LINEAR, "eps": (*NUMBER, -1.0, None)}),
    "delta_rule": (
        lasp.delta_rule,
        {**HEADS, "beta": torch.zeros(1, 8, 2)},
        {**OPERATOR, "beta": (*MISSING, torch.full((1, 8, 2), NAN)), "g": TENSOR, "normalize_qk": FLAG},
    ),
    "softmax_attention": (
        lasp.softmax_attention,
        HEADS,
        {**OPERATOR, "causal": FLAG, "method": (*NEVER, None), "initial_cu_seqlens": CU_SEQLENS},
    ),
    "short_convolution": (
        lasp.short_convolution,
        {"x": torch.zeros(1, 8, 4), "weight": torch.zeros(4, 3)},
        {**HALO, "weight": MISSING, "bias": TENSOR, "activation": (*NEVER, 1)},
    ),
    "token_shift": (lasp.token_shift, {"x": torch.zeros(1, 8, 4)}, HALO),
    "cross_entropy_sum": (
        cross_entropy_sum,
        {"hidden": torch.zeros(8, 4), "weight": torch.zeros(257, 4), "labels": IDS[0]},
        {"hidden": MISSING, "weight": MISSING, "labels": (*BAD_IDS, IDS[0] - 1), "chunk_tokens": (*COUNT, 0)},
    ),
    "model": (
        lambda model, **arguments: model(**arguments),
        {"tokens": IDS},
        {
            "tokens": BAD_IDS, "labels": [value for value in BAD_IDS if value is not None], "cache": (*NEVER, 1, ()),
            "output_cache": FLAG, "last_logits": COUNT, "cu_seqlens": CU_SEQLENS, "sp": (*NEVER, 1),
        },
    ),
    "generate": (
        generate,
        {"prompt": IDS, "max_new_tokens": 1},
        {
            "prompt": (*BAD_IDS, IDS[:, :0]), "max_new_tokens": (*COUNT, None), "temperature": (*NUMBER, -1.0, None),
            "top_k": (*COUNT, 0),
        },
    ),
    "prefill": (prefill, {"prompt": IDS}, {"prompt": (*BAD_IDS, IDS[:, :0]), "chunk_tokens": (*COUNT, 0, None)}),
    "parallelize": (
        parallelize,
        {"mesh": None},
        {
            "mesh": (*NEVER, 1), "data_parallel": (*NEVER, None), "recomputation": (*NEVER, None),
            "ffn_piece_tokens": (*COUNT, 0), "compile": FLAG, "cpu_offload": FLAG, "model": (*MISSING,),
        },
    ),
    "ConstantDecay": (ConstantDecay, {"log_decay": [0.0]}, {"log_decay": ([0.1], [NAN], ["x"], [None], [True], [1j])}),
    "ConstantDecay.scale": (ConstantDecay([-0.5]).scale, {"factor": 1.0}, {"factor": (*NUMBER, -1.0)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_values_are_named(name: str, model: CausalLM) -> None:
    function, good, bad = CASES[name]
    good = dict(good, model=model) if name in ("model", "generate", "prefill", "parallelize") else good
    function(**good)  # the control
    failures = []
    for argument, values in bad.items():
        for value in values:
            try:
                function(**{**good, argument: value})
                failures.append((argument, value, "accepted"))
            except ValueError as error:
                if argument not in str(error):
                    failures.append((argument, value, f"not named: {error}"))
            except Exception as error:
                failures.append((argument, value, repr(error)[:200]))
    assert not failures, "\n".join(map(str, failures))


def test_sequence_parallel_names_bad_values() -> None:
    """A group of one rank is enough to make one; every copy of it is refused."""

    def work(_rank: int) -> list[str]:
        group, found = dist.group.WORLD, []
        bad: dict[str, tuple[Any, ...]] = {
            "timeout_s": (*NUMBER, 0, -1.0, None), "lengths": (*NEVER, 8, [8, 8], [-8], [8.0], ["8"], [True], "8"),
            "exchange": (*NEVER, 1, None), "group": (*NEVER, 1, None),
        }  # fmt: skip
        sp = lasp.SequenceParallel(group, timeout_s=10, lengths=[8])
        calls: list[tuple[str, Any, Callable[[], Any]]] = [
            (name, value, lambda name=name, value=value: lasp.SequenceParallel(**{"group": group, name: value}))  # type: ignore[misc]
            for name, values in bad.items()
            for value in values
        ]
        calls += [("lengths", 8, lambda: sp.with_lengths(8)), ("tensor", None, lambda: sp.shard(None))]  # type: ignore[arg-type]
        calls += [("dim", dim, lambda dim=dim: sp.shard(torch.zeros(1, 8), dim)) for dim in (2, -3, 1.0, None)]  # type: ignore[misc]
        calls += [("copied", how, lambda how=how: how(sp)) for how in (copy.copy, copy.deepcopy, pickle.dumps)]  # type: ignore[misc]
        for name, value, call in calls:
            try:
                call()
                found.append(f"{name} {value!r} accepted")
            except Exception as error:
                if not isinstance(error, ValueError) or name not in str(error):
                    found.append(f"{name} {value!r} {error!r}")
        assert sp.shard(torch.zeros(1, 8)).shape == (1, 8), "the control"
        return found

    assert run(1, work) == [[]]


def test_a_convolution_without_sequences_keeps_its_state() -> None:
    """B = 0, as the other operators take it, with gradients."""
    x, state = torch.zeros(0, 8, 4, requires_grad=True), torch.zeros(0, 4, 2, requires_grad=True)
    y, final = lasp.short_convolution(x, torch.ones(4, 3), initial_state=state, output_final_state=True)
    (y.sum() + final.sum()).backward()
    assert y.shape == (0, 8, 4) and final.shape == (0, 4, 2) and state.grad.shape == state.shape
    with pytest.raises(ValueError, match=r"x must be .* at least one channel"):
        lasp.short_convolution(x[..., :0], torch.ones(0, 3))


def test_labels_that_are_ignored_are_in_the_vocabulary(model: CausalLM) -> None:
    assert model(IDS, labels=torch.full_like(IDS, -100)).num_tokens == 0
    assert model(IDS + 256, labels=IDS + 256).num_tokens == 8
