"""Models of transformers, split over ranks: loss, logits and all gradients are those of their own code, unsplit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
import world
from hf.small_models import SMALL, Measured, build, exactly, measured, recompute, tokens
from tolerances import relative_error
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lasp
import lasp.hf
from lasp.hf.check import check_layers

T = 61
IDS = tokens(2, T)
DENSE = {"input_ids": IDS, "labels": IDS.masked_fill(tokens(2, T, seed=2) < 20, -100)}
# Shards of one token, shorter than a convolution, and as equal as can be.
LAYOUTS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((31, 30), (1, 60)), 3: ((20, 20, 21), (25, 2, 34), (40, 1, 20))}
DOCUMENTS = (0, 1, 17, 40, T)
BOUND = 1e-11


class Case(NamedTuple):
    """A batch, and what it must give; recomputed: how layers are recomputed in backward, reentrant or not."""

    name: str
    batch: dict[str, Any]
    whole: Measured
    layouts: Sequence[tuple[int, ...]]
    recomputed: bool | None = None


def packed() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Documents in one row, as a collator packs them, and each by itself, its loss a part of the whole's mean."""
    ids = tokens(1, T)
    lengths = [end - start for start, end in pairwise(DOCUMENTS)]
    labels = ids.clone()
    labels[:, list(DOCUMENTS[:-1])] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_idx": positions}
    targets = T - len(lengths)
    return batch, [{"input_ids": part, "labels": part, "num_items_in_batch": targets} for part in ids.split(lengths, 1)]


def padded(side: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows of 40 and 21 tokens filled up, and each by itself."""
    rows = [tokens(1, 40), tokens(1, 21, seed=2)]
    gap = torch.zeros(1, 19, dtype=torch.int64)
    ids = torch.cat([rows[0], torch.cat([gap, rows[1]] if side == "left" else [rows[1], gap], 1)])
    mask = (ids > 0).to(torch.int64)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return batch, [{"input_ids": row, "labels": row, "num_items_in_batch": T - 2} for row in rows]


def cases(kind: str, size: int, *, thorough: bool) -> list[Case]:
    """Cases that a model is tried with, over so many ranks; all of them if thorough."""
    model, layouts = build(kind), LAYOUTS[size]
    found = [Case("dense", DENSE, measured(build(kind, router_loss=True), DENSE), layouts)]
    # Layers that are recomputed give no router's loss a gradient if reentrant, also in transformers.
    plain = measured(model, DENSE)
    found += [Case(f"recomputed, {way}", DENSE, plain, layouts[-1:], way) for way in (False, True)[: 1 + thorough]]
    batches = {"packed": packed(), "left": padded("left"), "right": padded("right")}
    for name, (batch, documents) in batches.items():
        if thorough or name != "right":
            found.append(Case(name, batch, measured(model, *documents), layouts if thorough else layouts[:1]))
    if thorough:  # transformers itself computes rows so that are filled up at their ends
        assert relative_error(measured(model, batches["right"][0]).loss, found[-1].whole.loss) < 1e-12
    return found


def errors(found: Measured, whole: Measured, part: Any, sp: Any) -> dict[str, float]:
    """Relative errors of a rank's results. Gradients: the mean over ranks is that of the whole."""
    start = sum(part["lasp_shard"].lengths[: part["lasp_shard"].rank])
    size = 1 if sp is None else sp.size
    zero = {name: torch.zeros_like(gradient) for name, gradient in whole.gradients.items()}
    gradients = zero | found.gradients
    if sp is not None:
        gradients = {name: sp.sum(gradient) / size for name, gradient in gradients.items()}
    return {
        "loss": relative_error(found.loss, whole.loss),
        "logits": relative_error(found.logits, whole.logits[:, start : start + found.logits.shape[1]]),
        "gradients": max(relative_error(gradients[name], whole.gradients[name]) for name in whole.gradients),
    }


def solve(kind: str, sp: Any, tried: Sequence[Case], **options: Any) -> dict[str, float]:
    """The largest error of each case on this rank, over its layouts."""
    found: dict[str, float] = {}
    for case in tried:
        model = build(kind, router_loss=case.name == "dense")
        if case.recomputed is not None:
            recompute(model, reentrant=case.recomputed)
        lasp.hf.parallelize(model, sp, **options)
        for lengths in case.layouts:
            part = lasp.hf.shard(case.batch, sp, lengths if sp is not None else None)
            largest = max(errors(measured(model, part), case.whole, part, sp).values())
            found[case.name] = max(found.get(case.name, 0.0), largest)
    return found


def alone(kind: str, whole: Measured, lengths: tuple[int, ...]) -> float:
    """The control: how far logits are off where a rank computes its tokens by itself, here the last."""
    start = sum(lengths[:-1])
    part = {"input_ids": IDS[:, start:], "position_ids": torch.arange(start, T)[None]}
    with exactly(), torch.no_grad():
        logits = build(kind)(**part, use_cache=False).logits
    return relative_error(logits, whole.logits[:, start:])


def compare(kind: str, size: int, *exchanges: str, thorough: bool = False, **options: Any) -> None:
    """Every case with the first exchange, packed documents with the others too."""
    tried = cases(kind, size, thorough=thorough)
    fewer = [case for case in tried if case.name == "packed"]

    def work(rank: int) -> list[dict[str, float]]:
        groups = [lasp.SequenceParallel(dist.group.WORLD, exchange=exchange) for exchange in exchanges]
        return [solve(kind, sp, fewer if number else tried, **options) for number, sp in enumerate(groups)]

    for found in chain(*world.run(size, work, deadline_s=300)):
        assert max(found.values()) < BOUND, found
    assert alone(kind, tried[0].whole, LAYOUTS[size][0]) > 1e-3


@pytest.mark.parametrize(
    ("kind", "size", "exchange", "method"),
    [
        ("qwen3_next", 2, "auto", "all_gather"),
        ("mamba2", 3, "ring", "auto"),
        ("nemotron_h", 2, "auto", "ulysses"),
        ("minimax", 2, "auto", "auto"),
    ],
)
def test_a_split_model_is_the_same_model(kind: str, size: int, exchange: str, method: str) -> None:
    compare(kind, size, exchange, softmax_method=method)


def test_one_process_with_our_operators() -> None:
    found = solve("qwen3_next", None, [case._replace(layouts=[()]) for case in cases("qwen3_next", 2, thorough=False)])
    assert max(found.values()) < BOUND, found


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", SMALL)
def test_every_type(kind: str, size: int) -> None:
    compare(kind, size, "ring", "all_gather", "doubling", "pipelined", thorough=True)


@pytest.mark.ci
def test_recomputation_that_sends_no_states_again() -> None:
    whole = measured(build("mamba2"), DENSE)

    def work(rank: int) -> tuple[float, list[int]]:
        sp, sent = lasp.SequenceParallel(dist.group.WORLD), []
        for options in ({}, {"context_fn": lasp.hf.keeping_exchanges}):
            model = lasp.hf.parallelize(build("mamba2").train(), sp)
            model.gradient_checkpointing_enable({"use_reentrant": False, **options})
            loss = model(**lasp.hf.shard(DENSE, sp)).loss
            before = sp.counters.sent_bytes
            loss.backward()
            sent.append(sp.counters.sent_bytes - before)
        errors = [
            relative_error(sp.sum(parameter.grad) / 2, whole.gradients[name])
            for name, parameter in model.named_parameters()
        ]
        return max(errors), sent

    found = world.run(2, work)
    assert max(error for error, _ in found) < 1e-5  # transformers' own fp32 within
    # A rank that passes nothing on in forward has nothing to send again.
    assert all(kept <= again for _, (again, kept) in found) and any(kept < again for _, (again, kept) in found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [kind for kind in ("kimi_linear", "bailing_hybrid") if kind in SMALL])
def test_latents_cross_ranks_and_not_keys(kind: str) -> None:
    whole = measured(build(kind), DENSE)

    def work(rank: int) -> tuple[float, list[int]]:
        found, sent = 0.0, []
        for method in ("auto", "ulysses"):
            sp = lasp.SequenceParallel(dist.group.WORLD)
            model = lasp.hf.parallelize(build(kind), sp, softmax_method=method)
            part = lasp.hf.shard(DENSE, sp)
            found = max(found, *errors(measured(model, part), whole, part, sp).values())
            attention = next(report.name for report in lasp.hf.describe(model) if "softmax" in report.operators[0])
            with exactly():
                _, (layer,) = check_layers(model, sp, [attention], tokens=T)
            sent.append(layer.sent_bytes)
        return found, sent

    # Two rows of latents of 16 numbers and positions of 4, as long as the longest shard; keys and values have 80.
    for error, (latents, _) in world.run(2, work):
        assert error < BOUND and latents == 2 * (T - 1) * (16 + 4) * 8


DENSE_KINDS = [kind if kind == "minimax" else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in SMALL]


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_sixteen_bits(kind: str) -> None:
    """Our operators are as far from fp32 as transformers' own are; experts are chosen anew, so not for mixtures."""
    exact, model = build(kind, torch.float32), build(kind, torch.bfloat16)
    routed = any("expert" in name for name, _ in model.named_parameters()) and kind != "minimax"
    with torch.no_grad():
        fp32, theirs = (one(**DENSE, use_cache=False).logits for one in (exact, model))
        lasp.hf.parallelize(model, None)
        ours = model(**lasp.hf.shard(DENSE, None)).logits
    assert ours.dtype == theirs.dtype and torch.isfinite(ours).all()
    assert relative_error(ours, fp32) < (0.5 if routed else 1.2 * relative_error(theirs, fp32) + 2e-3)


def test_two_batches_before_their_gradients() -> None:
    """Each batch is split by what is its own, also where its layers are recomputed after another batch has come."""
    model = build("qwen3_next")
    parts = measured(model, DENSE).gradients, measured(model, *packed()[1]).gradients

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        model = lasp.hf.parallelize(recompute(build("qwen3_next"), reentrant=False), sp)
        with exactly():
            first = model(**lasp.hf.shard(DENSE, sp)).loss
            both = first + model(**lasp.hf.shard(packed()[0], sp, (1, 60))).loss
            # In a thread of its own, as a GPU's backward pass runs.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(both.backward).result()
        return max(
            relative_error(sp.sum(p.grad) / 2, parts[0][name] + parts[1][name])
            for name, p in model.named_parameters()
            if name in parts[0]
        )

    assert max(world.run(2, work)) < BOUND


@pytest.mark.exhaustive
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp before", "fsdp after"])
def test_averaged_by_data_parallelism(wrapped: str) -> None:
    """The mean of gradients over the same ranks is the gradient of the whole."""
    whole = measured(build("qwen3_next"), DENSE)

    def work(rank: int) -> float:
        sp, model = lasp.SequenceParallel(dist.group.WORLD), build("qwen3_next")
        if wrapped != "fsdp before":
            lasp.hf.parallelize(model, sp)
        training = model
        if wrapped == "ddp":
            training = DistributedDataParallel(model)
        else:
            mesh = dist.init_device_mesh("cpu", (2,))
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=mesh)
        if wrapped == "fsdp before":
            lasp.hf.parallelize(model, sp)
        with exactly():
            loss = training(**lasp.hf.shard(DENSE, sp, (25, 36))).loss
            loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
        return max(
            relative_error(loss, whole.loss),
            *(relative_error(gradients[name], expected) for name, expected in whole.gradients.items()),
        )

    assert max(world.run(2, work)) < BOUND


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
def test_compiled_by_layer(kind: str) -> None:
    """Graphs break around what crosses ranks, and are not made anew for other tokens."""
    model = build(kind, torch.float32)

    def step(model: Any, batch: dict[str, Any]) -> Measured:
        model.zero_grad(set_to_none=True)
        output = model(**batch, use_cache=False)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Measured(output.loss.detach(), output.logits.detach(), gradients)

    whole = step(model, DENSE)

    def work(rank: int) -> tuple[float, list[int]]:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        lasp.hf.parallelize(model, sp)
        for module in model.modules():
            if type(module).__name__.endswith(("DecoderLayer", "Block")):
                module.compile(backend="eager")
        graphs, largest = [], 0.0
        for shift in (0, 1):
            batch = {name: value.roll(shift, 0) for name, value in DENSE.items()}
            part = lasp.hf.shard(batch, sp)
            found = step(model, part)
            if shift == 0:
                largest = max(errors(found, whole, part, sp).values())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return largest, graphs

    for largest, graphs in world.run(2, work, deadline_s=400):
        assert largest < 1e-4 and graphs[0] > 0 and graphs[1] == graphs[0]
