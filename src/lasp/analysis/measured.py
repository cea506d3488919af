"""Measured steps beside predicted ones: what they take relative to the formulas, by model, device and way.

A prediction of anything else is marked: nobody has seen how far it is off, and it has a range in place of a number.
`python -m benchmarks.plan_table` computes the constants here from benchmarks/results, and fails where they differ.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.model import layers
from lasp.models.config import ModelConfig


class MeasuredSteps(NamedTuple):
    """Whole training steps of one kind that stand in benchmarks/results.

    Attributes:
        device: a kind's name.
        rule, decay, key_dim, value_dim: of most layers' operators, as in `lasp.layers.mixer.Operator`.
        is_hybrid: there are softmax layers among them.
        compiled: blocks ran compiled.
        slowdown: measured time relative to the roofline's (lasp.analysis.timing), mean over the lengths.
        kept: memory beside weights, gradients and optimizer relative to what lasp.analysis.memory lists: kernels and
            compiled graphs recompute what PyTorch's operators keep.
        source: files.
    """

    device: str
    rule: str
    decay: str
    key_dim: int
    value_dim: int
    is_hybrid: bool
    compiled: bool
    slowdown: float
    kept: float
    source: str


_FAMILIES = "2026-11-30-nvidia-h200-train-families-[24].json"
# Rule, decay, K, V, hybrid; slowdown and kept, compiled and eager.
_H200 = (
    (("linear", "constant", 128, 128, False), (1.12, 0.50), (1.25, 0.98)),  # transnormer
    (("linear", "constant", 256, 512, False), (1.21, 0.40), (1.44, 0.78)),  # retnet
    (("linear", "channel", 256, 512, False), (1.19, 0.43), (1.40, 0.84)),  # gla
    (("delta", "none", 128, 128, False), (1.08, 0.35), (1.25, 0.70)),  # deltanet
    (("delta", "head", 256, 512, False), (1.18, 0.34), (1.76, 0.66)),  # gated-deltanet
    (("delta", "channel", 128, 128, True), (1.05, 0.40), (1.25, 0.82)),  # kda
    (("linear", "head", 128, 64, False), (0.96, 0.31), (1.19, 0.50)),  # mamba2
    (("linear", "constant", 64, 64, True), (1.12, 0.45), (1.28, 0.89)),  # hybrid
)
_H100_FILES = "2026-11-24-nvidia-h100-80gb-hbm3-train-transnormer-1b-*.json"
MEASURED = (
    *(
        MeasuredSteps("H200", *operator, compiled, *relative, _FAMILIES)
        for operator, *both in _H200
        for compiled, relative in zip((True, False), both, strict=True)
    ),
    MeasuredSteps("H100", "linear", "constant", 128, 128, False, True, 0.99, 0.83, _H100_FILES),
    MeasuredSteps("cpu", "linear", "constant", 32, 32, False, False, 1.0, 1.0, "2026-11-24-cpu-plan.json"),
)


def measured(config: ModelConfig, device: str, *, compiled: bool) -> MeasuredSteps | None:
    """The measured steps of such a model on such a device, run in such a way; None where there are none.

    LRPE doubles the keys of the first layer of a model, so the most common operator counts.
    """
    operators = [each.operator for each in layers(config)]
    recurrent = [each for each in operators if each.rule != "softmax"]
    if not recurrent:
        return None
    common = max(recurrent, key=recurrent.count)
    asked = (
        device,
        common.rule,
        common.decay,
        common.key_dim,
        common.value_dim,
        len(recurrent) < len(operators),
        compiled,
    )
    return next((steps for steps in MEASURED if steps[:7] == asked), None)


def slowdowns(*, compiled: bool) -> tuple[float, float]:
    """The least and the largest slowdown of what was measured on any GPU in such a way."""
    found = [steps.slowdown for steps in MEASURED if steps.compiled == compiled and steps.device != "cpu"]
    return min(found), max(found)
