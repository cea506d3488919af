"""Profiles of a training step: its time by part of the model, and kernel by kernel.

Every operator belongs to the innermost module around it whose part is known; one of the backward pass to the part of
the operator whose gradient it takes. What runs outside of the model is the optimizer's. A compiled block is one
operator to the profiler: in it, kernels are told apart by name, and matrix products by the shapes of their weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lasp.layers import NORMS, GatedHeadNorm, Mixer, ShortConvolution
from lasp.layers.feedforward import GatedLinearUnit, TwoLayer
from lasp.layers.norms import RMSNorm, SimpleRMSNorm
from lasp.models.causal_lm import Block

MIXER, CONVOLUTION, FEED_FORWARD, NORM = "mixer", "convolution", "feed-forward", "norms"
LOSS, OPTIMIZER, EXCHANGE, BLOCK = "embedding and loss", "optimizer and clipping", "exchange", "compiled, fused"
Work: TypeAlias = dict[tuple[str, str], tuple[int, float]]  # calls and seconds, by kernel and part
PARTS = (MIXER, CONVOLUTION, FEED_FORWARD, NORM, BLOCK, LOSS, OPTIMIZER, EXCHANGE)
_MODULES: dict[type[nn.Module], str] = {
    ShortConvolution: CONVOLUTION,
    GatedLinearUnit: FEED_FORWARD,
    TwoLayer: FEED_FORWARD,
    GatedHeadNorm: NORM,
    RMSNorm: NORM,
    SimpleRMSNorm: NORM,
    nn.LayerNorm: NORM,
}
assert len(NORMS) == 3, "a new norm is told apart here too"
_RANGE = "part: "
_BY_NAME = (
    (EXCHANGE, re.compile(r"nccl|gloo|c10d|push_kernel|fold_kernel|collect_kernel|lasp::exchange")),
    (CONVOLUTION, re.compile(r"convolution(_gradient)?_kernel|lasp::convolution")),
    (NORM, re.compile(r"gated_norm")),
)
_FUSED = re.compile(r"^triton_|^void |at::native|^Mem")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_PRODUCT = re.compile(r"nvjet|gemm|cutlass|cublas|sm90_xmma")


def part_of(module: nn.Module) -> str | None:
    """The part that a module is; None for one that has several, or is within one."""
    return MIXER if isinstance(module, Mixer) else _MODULES.get(type(module))


def profiled(step: Callable[[], None], model: nn.Module, device: torch.device, count: int = 25) -> dict[str, Any]:
    """Profile one step.

    Args:
        model: the one that the step trains, its blocks compiled or not.
        count: of the kernels that are listed.

    Returns:
        "kernels": name, calls, seconds and share of the kernels (on a CPU, of the operators) that took longest, and
        "parts": of every part in PARTS its seconds, and the operations of its matrix products, by their shapes.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _ranges(model), profile(activities=activities, record_shapes=True, acc_events=True) as found:
        step()
    weights, events = _weights(model), list(found.events())
    work: Work = {}
    parts = {part: {"s": 0.0, "product_flops": 0.0} for part in PARTS}
    for event, place in _placed(events):
        for name, seconds in _work(event, on_gpu):
            part = _part(name, event, place, weights)
            calls, before = work.get((name, part), (0, 0.0))
            work[name, part] = calls + 1, before + seconds
            parts[part]["product_flops"] += _product_flops(event)
    if on_gpu:
        work = each_once(work, Counter(event.name for event in events if not str(event.device_type).endswith("CPU")))
    kernels: dict[str, tuple[int, float]] = {}
    for (name, part), (calls, seconds) in work.items():
        parts[part]["s"] += seconds
        known, before = kernels.get(name, (0, 0.0))
        kernels[name] = known + calls, before + seconds
    total = sum(part["s"] for part in parts.values()) or 1.0
    longest = sorted(kernels.items(), key=lambda each: -each[1][1])[:count]
    rows = [{"name": name, "calls": calls, "s": s, "share": s / total} for name, (calls, s) in longest]
    return {"kernels": rows, "parts": parts}


def each_once(work: Work, ran: Counter[str]) -> Work:
    """Scale the work of every kernel to the calls that there were: the profiler gives kernels of an operator that has
    many, such as the optimizer's step, to several operators at times."""
    given = Counter[str]()
    for (name, _), (calls, _) in work.items():
        given[name] += calls
    share = {name: min(1.0, ran[name] / given[name]) if ran[name] else 1.0 for name in given}
    return {key: (round(share[key[0]] * calls), share[key[0]] * s) for key, (calls, s) in work.items()}


@contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Mark what modules do, but inside of compiled blocks, which are marked whole."""
    hooks, open_ranges = [], []

    def enter(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(_RANGE + part))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    def mark(module: nn.Module, part: str) -> None:
        hooks.append(module.register_forward_pre_hook(enter(part)))
        hooks.append(module.register_forward_hook(leave))

    def walk(module: nn.Module) -> None:
        for child in module.children():
            compiled = isinstance(child, Block) and type(vars(child).get("forward")).__name__ == "_Compiled"
            part = BLOCK if compiled else part_of(child)
            if part is not None:
                mark(child, part)
            if not compiled:
                walk(child)

    mark(model, LOSS)
    walk(model)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _placed(events: Any) -> Iterator[tuple[Any, str]]:
    """Every operator of the host's, and the part that it belongs to."""
    host = [event for event in events if str(event.device_type).endswith("CPU")]
    forward: dict[tuple[int, int], tuple[float, str]] = {}
    for event in host:
        if event.sequence_nr >= 0 and event.scope == 0 and (place := _range(event)):
            key = event.thread, event.sequence_nr
            # An operator that makes no node has the number of the next that does: the last one counts.
            if event.time_range.start >= forward.get(key, (-1.0, ""))[0]:
                forward[key] = event.time_range.start, place
    for event in host:
        if not event.name.startswith(_RANGE):
            yield event, _range(event) or _differentiated(event, forward) or OPTIMIZER


def _range(event: Any) -> str | None:
    """The innermost range around an event."""
    while event is not None:
        if event.name.startswith(_RANGE):
            return str(event.name.removeprefix(_RANGE))
        event = event.cpu_parent
    return None


def _differentiated(event: Any, forward: dict[tuple[int, int], tuple[float, str]]) -> str | None:
    """The part of what an event of the backward pass takes the gradient of; None outside of that pass.

    A node may run a pass of its own inside, over what it has just recomputed: the outermost known one counts.
    """
    found = None
    while event is not None:
        if event.scope == 1:  # a node of the backward pass
            found = forward.get((event.fwd_thread, event.sequence_nr), (0.0, found or LOSS))[1]
        event = event.cpu_parent
    return found


def _work(event: Any, on_gpu: bool) -> list[tuple[str, float]]:
    """Names and seconds of an operator's own kernels; on a CPU of the operator."""
    if on_gpu:
        return [(kernel.name, kernel.duration / 1e6) for kernel in event.kernels]
    return [(event.name, event.self_cpu_time_total / 1e6)]


def _part(name: str, event: Any, place: str, weights: dict[frozenset[int], str]) -> str:
    """The part of a kernel whose operator belongs to `place`."""
    for part, pattern in _BY_NAME:
        if pattern.search(name) or pattern.search(event.name):
            return part
    if place != BLOCK or _FUSED.search(name):
        return place
    if _PRODUCT.search(name) or event.name in _PRODUCTS:
        shapes = [frozenset(shape) for shape in event.input_shapes or () if len(shape) == 2]
        # Two of the three shapes in a product and its gradients are activations, [tokens, channels].
        channels = shapes[0] ^ shapes[1] if len(shapes) == 2 else frozenset()
        return next((weights[each] for each in (channels, *shapes) if each in weights), BLOCK)
    return MIXER if name.endswith("_kernel") else BLOCK


def _product_flops(event: Any) -> float:
    """Operations of a product of matrices; 0 of anything else."""
    if event.name not in _PRODUCTS:
        return 0.0
    summed = event.name == "aten::addmm"
    first, second = event.input_shapes[summed : summed + 2]
    return 2.0 * math.prod(first) * second[-1]


def _weights(model: nn.Module) -> dict[frozenset[int], str]:
    """Parts by the sides of their weight matrices, where those tell them apart."""
    found: dict[frozenset[int], set[str]] = {}
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for part, module in ((MIXER, block.attention), (FEED_FORWARD, block.ffn)):
            for linear in [] if module is None else module.modules():
                if isinstance(linear, nn.Linear):
                    found.setdefault(frozenset(linear.weight.shape), set()).add(part)
    return {sides: parts.pop() for sides, parts in found.items() if len(parts) == 1}
