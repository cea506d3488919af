"""The steps that were measured. A prediction of any other is marked: nobody has seen how far it is off."""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.model import layers
from lasp.layers.mixer import Operator
from lasp.models.config import ModelConfig


class MeasuredSteps(NamedTuple):
    """Whole training steps of one kind that stand in benchmarks/results.

    Attributes:
        device: a kind's name.
        rule, decay, key_dim, value_dim: of the layers' operators, as in `lasp.layers.mixer.Operator`.
        source: files.
    """

    device: str
    rule: str
    decay: str
    key_dim: int
    value_dim: int
    source: str

    def covers(self, device: str, operator: Operator) -> bool:
        """True for a step of such layers on such a device."""
        asked = (device, operator.rule, operator.decay, operator.key_dim, operator.value_dim)
        return self[:5] == asked


MEASURED = (
    MeasuredSteps(
        "H100", "linear", "constant", 128, 128, "2026-11-24-nvidia-h100-80gb-hbm3-train-transnormer-1b-*.json"
    ),
    MeasuredSteps("H200", "linear", "constant", 128, 128, "2026-11-26-nvidia-h200-train-transnormer-1b-*.json"),
    MeasuredSteps("H200", "linear", "channel", 256, 512, "2026-11-29-nvidia-h200-train-gla-1b.json"),
    MeasuredSteps("cpu", "linear", "constant", 32, 32, "2026-11-24-cpu-plan.json"),
)


def measured(config: ModelConfig, device: str) -> str | None:
    """The files in benchmarks/results that have steps of such a model on such a device; None where there are none.

    LRPE doubles the keys of the first layer of a model, so the most common operator counts.
    """
    operators = [each.operator for each in layers(config)]
    common = max(operators, key=operators.count)
    if any(each.rule != common.rule for each in operators):
        return None
    return next((steps.source for steps in MEASURED if steps.covers(device, common)), None)
