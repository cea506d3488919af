"""Whatever is passed where it does not belong: a ValueError that names the argument, of every public function."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from world import run

import lasp
from lasp import generate, layers, models
from lasp.layers import MIXERS, ConstantDecay, LayerContext
from lasp.models import CausalLM, ModelConfig, preset
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
NORMALIZED = {**OPERATOR, "q": (*MISSING, lambda: None, lambda: torch.zeros(3)), "g": TENSOR, "causal": FLAG}
LINEAR = {**NORMALIZED, "log_weight": TENSOR, "skip": TENSOR}
KEYS = {name: HEADS[name] for name in ("k", "v")}
OPERATOR_BEGUN, BEGUN, NORMALIZED_BEGUN = (
    {name: each[name] for name in each if name != "q"} for each in (OPERATOR, LINEAR, NORMALIZED)
)
DELTA = {
    "beta": (*MISSING, torch.full((1, 8, 2), NAN)), "g": TENSOR, "normalize_qk": FLAG, "erase_key": TENSOR,
}  # fmt: skip
HALO = {"x": MISSING, "initial_state": TENSOR, **{n: OPERATOR[n] for n in ("output_final_state", "cu_seqlens", "sp")}}
IDS = torch.zeros(1, 8, dtype=torch.int64)
BAD_IDS = (*MISSING, IDS.int(), IDS + 0.5, IDS - 1, IDS + 257, IDS[0, 0])
COUNT = (*NEVER, 0.5, "3", -1, True, NAN)
SIZE, ABOVE_0, WORD, OTHER = (*COUNT, 0, None), (*NUMBER, -1.0, 0.0, None), (*NEVER, 1, None), (*NEVER, 1)
CONTEXT = LayerContext(8)
WRONG: list[dict[str, Any]] = [
    {"d_model": "x"}, {"d_model": 0}, {"layer": 1.5}, {"num_layers": 0}, {"norm_eps": -1.0}, {"backend": 1},
]  # fmt: skip
BAD_CONTEXT: tuple[Any, ...] = (*NEVER, None, (8,), *(CONTEXT._replace(**field) for field in WRONG))
TINY = preset("mamba2", "tiny")
SAMPLING = {"temperature": (*NUMBER, -1.0, None), "top_k": (*COUNT, 0), "generator": OTHER}


def fields_of(config: Any) -> dict[str, tuple[Any, ...]]:
    """Values that no field of a configuration takes, by its annotation."""
    by_kind = {"int": SIZE, "int | None": (*COUNT, 0), "bool": FLAG, "float": ABOVE_0, "str": WORD}
    may_be_0 = {"gate_rank", "ffn_dim"}  # a projection of full rank; no feed-forward layer
    return {
        field.name: COUNT if field.name in may_be_0 else by_kind.get(str(field.type), (*NEVER, None, 1, (), (1,)))
        for field in dataclasses.fields(config)
    }


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return CausalLM(preset("mamba2", "tiny", num_layers=1))


PREFILLED = generate.prefill(CausalLM(preset("mamba2", "tiny", num_layers=1)), IDS)
Case = tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "linear_attention": (lasp.linear_attention, HEADS, LINEAR),
    "normalized_linear_attention": (
        lasp.normalized_linear_attention, HEADS, {**NORMALIZED, "eps": (*NUMBER, -1.0, None)}
    ),
    "delta_rule": (
        lasp.delta_rule,
        {**HEADS, "beta": torch.zeros(1, 8, 2)},
        {**OPERATOR, **DELTA},
    ),
    "softmax_attention": (
        lasp.softmax_attention,
        HEADS,
        {
            **OPERATOR,
            "causal": FLAG,
            "method": (*NEVER, None),
            "initial_cu_seqlens": CU_SEQLENS,
            "window": (*COUNT, 0),
            "softcap": (*NUMBER, -1.0, 0.0),
            "sinks": TENSOR,
        },
    ),
    "short_convolution": (
        lasp.short_convolution,
        {"x": torch.zeros(1, 8, 4), "weight": torch.zeros(4, 3)},
        {**HALO, "weight": MISSING, "bias": TENSOR, "activation": (*NEVER, 1)},
    ),
    "linear_attention_begin": (lasp.linear_attention_begin, KEYS, BEGUN),
    "normalized_linear_attention_begin": (
        lasp.normalized_linear_attention_begin, KEYS, {**NORMALIZED_BEGUN, "eps": (*NUMBER, -1.0, None)}
    ),
    "delta_rule_begin": (
        lasp.delta_rule_begin,
        {**KEYS, "beta": torch.zeros(1, 8, 2)},
        {**OPERATOR_BEGUN, **DELTA},
    ),
    "finish": (
        lambda q: lasp.linear_attention_begin(KEYS["k"], KEYS["v"]).finish(q), {"q": HEADS["q"]}, {"q": MISSING}
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
    **{
        name: (
            getattr(generate, name),
            {"prompt": IDS, "max_new_tokens": 1},
            {
                "prompt": (*BAD_IDS, IDS[:, :0]), "max_new_tokens": (*COUNT, None), "model": (*NEVER, None),
                "sp": OTHER, **SAMPLING,
            },
        )
        for name in ("generate", "stream")
    },
    "prefill": (
        generate.prefill,
        {"prompt": IDS},
        {
            "prompt": (*BAD_IDS, IDS[:, :0]), "chunk_tokens": (*COUNT, 0, None), "model": (*NEVER, None), "sp": OTHER,
            "cache": (*OTHER, ()),
        },
    ),
    "decode": (
        generate.decode,
        {"prefilled": PREFILLED, "max_new_tokens": 1},
        {"prefilled": (*NEVER, None, ()), "model": (*NEVER, None), "max_new_tokens": (*COUNT, None), **SAMPLING},
    ),
    "sample": (
        generate.sample,
        {"logits": torch.zeros(2, 5)},
        {"logits": (*MISSING, torch.zeros(2), torch.zeros(2, 0)), **SAMPLING},
    ),
    "parallelize": (
        parallelize,
        {"mesh": None},
        {
            "mesh": (*NEVER, 1), "data_parallel": (*NEVER, None), "recomputation": (*NEVER, None),
            "ffn_piece_tokens": (*COUNT, 0), "compile": FLAG, "cpu_offload": FLAG, "model": (*MISSING,),
        },
    ),
    "norm": (layers.norm, {"name": "rmsnorm", "dim": 4, "eps": 1e-5}, {"name": WORD, "dim": SIZE, "eps": ABOVE_0}),
    "RMSNorm": (layers.RMSNorm, {"dim": 4, "eps": 1e-5}, {"dim": SIZE, "eps": ABOVE_0}),
    "SimpleRMSNorm": (layers.SimpleRMSNorm, {"dim": 4, "eps": 1e-5}, {"dim": SIZE, "eps": ABOVE_0}),
    "feature_map": (
        layers.feature_map,
        {"name": "relu", "num_heads": 2, "head_dim": 4},
        {"name": WORD, "num_heads": SIZE, "head_dim": SIZE},
    ),
    "feedforward": (
        layers.feedforward,
        {"name": "swiglu", "d_model": 2, "ffn_dim": 4},
        {"name": WORD, "d_model": SIZE, "ffn_dim": SIZE},
    ),
    "Rotary": (layers.Rotary, {"head_dim": 4}, {"head_dim": (*SIZE, 3), "base": ABOVE_0}),
    "LRPE": (layers.LRPE, {"num_heads": 2, "head_dim": 4}, {"num_heads": SIZE, "head_dim": SIZE, "base": ABOVE_0}),
    "sinusoids": (
        layers.sinusoids,
        {"positions": torch.zeros(3, dtype=torch.float64), "dim": 4, "base": 1e4, "dtype": torch.float32},
        {
            "positions": (*NEVER, 1.0, None, [0.5], IDS[0]), "dim": (*SIZE, 3), "base": ABOVE_0,
            "dtype": (*NEVER, None, torch.int64),
        },
    ),
    "ShortConvolution": (
        layers.ShortConvolution,
        {"channels": 4},
        {"channels": SIZE, "width": (*SIZE, 9), "bias": FLAG, "activation": (*OTHER, "relu")},
    ),
    "GatedHeadNorm": (
        layers.GatedHeadNorm,
        {"value_dim": 4, "eps": 1e-5, "activation": None},
        {"value_dim": SIZE, "eps": ABOVE_0, "activation": OTHER},
    ),
    "LowRank": (
        layers.LowRank,
        {"dim_in": 4, "rank": 2, "dim_out": 4},
        {"dim_in": SIZE, "rank": SIZE, "dim_out": SIZE, "bias": FLAG},
    ),
    "SteppedDecay": (layers.SteppedDecay, {"num_heads": 2}, {"num_heads": SIZE, "channels": SIZE}),
    "SteppedDecay.scale": (layers.SteppedDecay(2).scale, {"factor": 1.0}, {"factor": ABOVE_0}),
    "alibi_slopes": (layers.alibi_slopes, {"num_heads": 3}, {"num_heads": SIZE}),
    **{
        name: (
            getattr(layers, name),
            {"num_heads": 2, "layer": 0, "num_layers": 2},
            {"num_heads": SIZE, "layer": (*COUNT, None, 2), "num_layers": SIZE},
        )
        for name in ("transnormer_log_decay", "retnet_log_decay")
    },
    "ModelConfig": (ModelConfig, dict(vars(TINY)), fields_of(TINY)),
    "CausalLM": (CausalLM, {"config": preset("mamba2", "tiny", num_layers=1)}, {"config": (*NEVER, None, {})}),
    "CausalLM.init_weights": (lambda model, **given: model.init_weights(**given), {}, {"generator": OTHER}),
    "from_settings": (
        models.from_settings,
        {"settings": {"vocab_size": 5, "num_layers": 1, **dict.fromkeys(("d_model", "ffn_dim", "num_heads"), 2),
                      **dict.fromkeys(("key_dim", "value_dim"), 2)}},
        {"settings": (*NEVER, None, 1, {1: 2})},
    ),
    "preset": (
        preset,
        {"name": "gla", "size": "tiny"},
        {"name": WORD, "size": WORD, "num_heads": SIZE, "tied_embeddings": FLAG, "init_std": ABOVE_0, "nonsense": [1]},
    ),
    "sizes": (models.sizes, {"name": "gla"}, {"name": WORD}),
    "num_parameters": (models.num_parameters, {"config": TINY}, {"config": (*NEVER, None)}),
    "ConstantDecay": (ConstantDecay, {"log_decay": [0.0]}, {"log_decay": ([0.1], [NAN], ["x"], [None], [True], [1j])}),
    "ConstantDecay.scale": (ConstantDecay([-0.5]).scale, {"factor": 1.0}, {"factor": (*NUMBER, -1.0)}),
}  # fmt: skip
for _name, _kind in MIXERS.items():
    _config: dict[str, Any] = {"num_heads": 2, "key_dim": 4, "value_dim": 4, **_kind.settled}
    _layer = _kind.config(**_config).layer
    CASES[f"{_name}: configuration"] = (_kind.config, _config, fields_of(_kind.config))
    CASES[_layer.__name__] = (
        _layer,
        {"config": _kind.config(**_config), "context": CONTEXT},
        {"config": (*NEVER, None, TINY), "context": BAD_CONTEXT},
    )
    CASES[f"{_name}: forward"] = (
        _kind.config(**_config).build(CONTEXT),
        {"x": torch.zeros(1, 8, 8)},
        {
            "x": (*MISSING, torch.zeros(1, 8, 7), torch.zeros(8, 8)), "start": COUNT, "state": OTHER,
            "output_state": FLAG, "cu_seqlens": CU_SEQLENS, "sp": (*OTHER, True),
        },
    )  # fmt: skip
# To derive from, or given by others; errors. SequenceParallel has a test of its own.
NO_ENTRIES = {
    "ExchangeError", "SequenceParallel", "Mixer", "MixerConfig", "LayerContext", "LayerState", "RecurrentState",
    "Cache", "LMOutput", "Prefilled",
}  # fmt: skip


def test_every_public_entry_is_here() -> None:
    """Every argument of it is, too."""
    missing = []
    for module in (lasp, layers, models, generate):
        for name in sorted(set(module.__all__) - NO_ENTRIES):
            if callable(entry := getattr(module, name)):
                tested = {"overrides", *(CASES[name][2] if name in CASES else {})}
                missing += [f"{name}: {each}" for each in inspect.signature(entry).parameters if each not in tested]
    assert not missing


@pytest.mark.parametrize("name", CASES)
def test_bad_values_are_named(name: str, model: CausalLM) -> None:
    function, good, bad = CASES[name]
    good = dict(good, model=model) if "model" in inspect.signature(function).parameters else good
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
        calls += [("number", value, lambda value=value: sp.begin_step(value)) for value in (*COUNT, None)]  # type: ignore[misc]
        for each in (sp.sum, lambda tensor: sp.broadcast(tensor, 0)):
            calls += [("tensor", bad, lambda each=each, bad=bad: each(bad)) for bad in (*NEVER[:4], META, FAKE, None)]  # type: ignore[misc]
        calls += [("source", bad, lambda bad=bad: sp.broadcast(IDS, bad)) for bad in (*COUNT, 1, None)]  # type: ignore[misc]
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
