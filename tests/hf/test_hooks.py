"""Tests what parallelize changes of a model and of transformers, what restore leaves, and what is refused, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import SMALL, build, exactly, measured, tokens
from torch import nn

import lasp
import lasp.hf
from lasp.check.compare import _forgetful
from lasp.distributed import ExchangeError
from lasp.exchange import EXCHANGES

IDS = tokens(2, 12)
BATCH = {"input_ids": IDS, "labels": IDS}


def state_of(model: Any) -> tuple[Any, ...]:
    """All that parallelize may touch: the functions of the model's file, hooks, attention, loss."""
    file = import_module(type(model).__module__)
    functions = {name: value for name, value in vars(file).items() if callable(value)}
    hooks = [
        dict(registry)
        for module in model.modules()
        for registry in (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
    ]
    return functions, hooks, model.config._attn_implementation, {k for k in vars(model) if "loss" in k}


def same(one: Any, other: Any) -> bool:
    return (
        torch.equal(one.loss, other.loss)
        and torch.equal(one.logits, other.logits)
        and all(torch.equal(one.gradients[name], other.gradients[name]) for name in one.gradients)
    )


def test_other_models_are_untouched_and_restore_leaves_nothing() -> None:
    model, other = build("qwen3_next"), build("qwen3_next")
    first = measured(other, BATCH)
    assert same(measured(model, BATCH), first)  # which has transformers put in hooks of its own
    before = state_of(model)
    lasp.hf.parallelize(model, None)
    assert state_of(model)[0] != before[0] and state_of(model)[2].startswith("lasp")
    assert same(measured(other, BATCH), first)
    split = measured(model, lasp.hf.shard(BATCH, None))
    assert same(measured(other, BATCH), first)
    # Whole batches run as before where no gradient is wanted, padded ones too.
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).tril(6)}
    with torch.no_grad(), exactly():
        assert torch.equal(model(**padded).logits, other(**padded).logits)
    copied = copy.deepcopy(model)
    assert lasp.hf.restore(model) is model
    assert same(measured(model, BATCH), first)
    # A copy is parallelized by itself, and still is.
    assert same(measured(copied, lasp.hf.shard(BATCH, None)), split)
    lasp.hf.restore(copied)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="not parallelized"):
        lasp.hf.restore(model)


def test_a_function_that_is_not_called_is_an_error() -> None:
    model = lasp.hf.parallelize(build("mamba2"), None)
    file: Any = import_module(type(model).__module__)
    dispatcher = file.mamba2_chunk_scan
    file.mamba2_chunk_scan = dispatcher.__wrapped__
    try:
        with pytest.raises(RuntimeError, match=r"layers\.0\.mixer did not call mamba2_chunk_scan"):
            model(**lasp.hf.shard(BATCH, None))
    finally:
        file.mamba2_chunk_scan = dispatcher
    # Nothing of the failed pass is left.
    assert model(**lasp.hf.shard(BATCH, None)).loss.isfinite()
    # A mixer that nobody tells what splits its batch.
    model.backbone.layers[0].mixer.register_forward_pre_hook(drop, with_kwargs=True, prepend=True)
    model.backbone.layers[0]._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="not told how its batch is split"):
        model(**lasp.hf.shard(BATCH, None))


def test_a_bad_number_is_a_bad_loss_as_in_transformers() -> None:
    """Programs report a loss of NaN and go on, or stop; an assertion on a GPU would end the process."""
    model = lasp.hf.parallelize(build("qwen3_next"), None)
    with torch.no_grad():
        model.model.layers[0].linear_attn.A_log.fill_(torch.nan)
    assert model(**lasp.hf.shard(BATCH, None)).loss.isnan()
    q, g = torch.ones(1, 2, 1, 4), torch.full((1, 2, 1), torch.nan)
    with pytest.raises(ValueError, match="g is the natural logarithm"):
        lasp.delta_rule(q, q, q, torch.ones(1, 2, 1), g)


def drop(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
    return arguments, {name: value for name, value in options.items() if name != "lasp_shard"}


def with_convolution(model: Any) -> Any:
    model.extra = nn.Conv1d(4, 4, 3)
    return model


def classifier(_: Any) -> Any:
    import transformers

    return transformers.Qwen3NextForSequenceClassification(build("qwen3_next").config)


def llama(_: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=8, **sizes))


def rope(model: Any) -> Any:
    model.config.rope_parameters["rope_type"] = "dynamic"
    return model


def logits_loss(model: Any) -> Any:
    model.config.z_loss_coefficient = 0.1
    return model


def dropout(model: Any) -> Any:
    next(m for name, m in model.named_modules() if name.endswith("self_attn")).attention_dropout = 0.1
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (llama, "'llama', which cannot be split yet; known: .*mamba2"),
        (classifier, "another loss than that of the next token"),
        (with_convolution, "extra is a Conv1d outside of the known layers"),
        (rope, "positions of the type 'dynamic'.*use 'default'"),
        (logits_loss, "set config.z_loss_coefficient to 0"),
        (dropout, "set config.attention_dropout to 0"),
        (lambda model: lasp.hf.parallelize(model, None), "parallelized already: lasp.hf.restore"),
        (lambda model: nn.Linear(1, 1), "Linear holds none"),
    ],
)
def test_what_cannot_be_split_is_refused_untouched(change: Callable[[Any], Any], message: str) -> None:
    model = change(build("qwen3_next"))
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        lasp.hf.parallelize(model, None)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before


def test_batches_that_are_not_split_are_refused() -> None:
    model = lasp.hf.parallelize(build("mamba2"), None).train()
    part = lasp.hf.shard(BATCH, None)
    wrong = copy.copy(part["lasp_shard"])
    object.__setattr__(wrong, "rank", 1)
    for batch, message in (
        (BATCH, r"must be split: model\(\*\*lasp.hf.shard\(batch, sp\)\)"),
        (part | {"lasp_shard": wrong}, "the batch is the part of rank 1 of 1"),
        (part | {"lasp_shard": "half"}, "must be what lasp.hf.shard gives, got str"),
        (part | {"attention_mask": torch.ones_like(IDS)}, "give it to lasp.hf.shard"),
        (part | {"use_cache": True}, "a split batch fills no cache"),
        (
            part | {"input_ids": IDS[:, 1:]},
            "the model is given 11 tokens, and this part of the batch has 12: call it with",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch)
    with torch.no_grad():
        assert model(**BATCH).loss.isfinite()


def test_a_check_tells_a_lost_state_and_other_tokens() -> None:
    """The control of the comparison, too: an exchange that forgets is seen."""
    model = build("mamba2", torch.float32).train()

    def work(rank: int) -> tuple[bool, bool, str]:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        good = lasp.hf.check(lasp.hf.parallelize(model, sp), sp).passes
        lasp.hf.restore(model)
        forgets = lasp.SequenceParallel(dist.group.WORLD, exchange=_forgetful(EXCHANGES["ring"]()))
        bad = lasp.hf.check(lasp.hf.parallelize(model, forgets), forgets).passes
        ids = IDS + rank
        try:
            model(**lasp.hf.shard({"input_ids": ids, "labels": ids}, forgets))
        except ExchangeError as error:
            return good, bad, str(error)
        return good, bad, "nothing"

    for good, bad, message in world.run(2, work):
        assert good and not bad and "data of the step" in message


def test_a_report_on_every_layer() -> None:
    model = build("lfm3") if "lfm3" in SMALL else build("minimax")
    with pytest.raises(ValueError, match="parallelize"):
        lasp.hf.describe(model)
    reports = lasp.hf.describe(lasp.hf.parallelize(model, None))
    assert {report.operators for report in reports} <= {
        ("short_convolution",),
        ("softmax_attention",),
        ("linear_attention",),
    }
    assert {report.exchange for report in reports} == {"none"} and len(reports) >= 2
