"""Operations of a model by its configuration, against what PyTorch counts when the model runs token by token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lasp.layers
from lasp.analysis.devices import peak_flops
from lasp.analysis.flops import flops_per_token
from lasp.models import NAMES, CausalLM, preset
from lasp.ops.pending import PendingOutputs

TOKENS = 6


def start_of(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A state that is not known to be zero."""
    return k.new_zeros(k.shape[0] * v.shape[2], k.shape[-1], v.shape[-1]).requires_grad_()


def rows(x: torch.Tensor, t: int, heads: int) -> torch.Tensor:
    return x[:, t].repeat_interleave(heads // x.shape[2], 1).reshape(-1, 1, x.shape[-1])


def with_gates(o: torch.Tensor, *gates: torch.Tensor | None) -> torch.Tensor:
    """Gates are elementwise, but the matrices that make them have gradients."""
    return o + sum(gate.sum() for gate in gates if gate is not None)


def recurrence(q, k, v, g=None, **options):
    state, heads, outputs = start_of(k, v), v.shape[2], []
    for t in range(q.shape[1]):
        state = state + rows(k, t, heads).mT @ rows(v, t, heads)
        outputs.append((rows(q, t, heads) @ state).view(v.shape[0], heads, -1))
    return with_gates(torch.stack(outputs, 1), g), None


def corrected(q, k, v, beta, g=None, **options):
    state, heads, outputs = start_of(k, v), v.shape[2], []
    for t in range(q.shape[1]):
        key = rows(k, t, heads)
        state = state + key.mT @ (rows(v, t, heads) - key @ state)
        outputs.append((rows(q, t, heads) @ state).view(v.shape[0], heads, -1))
    return with_gates(torch.stack(outputs, 1), beta, g), None


def half_seen(q, k, v, **options):
    """Softmax attention of every token to half of the tokens, the average of a causal one."""
    q, k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    half = k.shape[2] // 2
    return ((q @ k[:, :, :half].mT).softmax(-1) @ v[:, :, :half]).transpose(1, 2), None


def begun(operator):
    """The operator as one that waits for its queries."""
    return lambda *given, **options: PendingOutputs(lambda q: operator(q, *given, **options))


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = {
        "linear_attention_begin": begun(recurrence),
        "delta_rule_begin": begun(corrected),
        "softmax_attention": half_seen,
    }
    for module in filter(inspect.ismodule, vars(lasp.layers).values()):
        for operator in operators.keys() & vars(module).keys():
            monkeypatch.setattr(module, operator, operators[operator])

    # PyTorch counts a depthwise convolution's backward pass as a dense one's; ours is elementwise work.
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], **_: Any) -> Any:
        x, *rest = x.split((len(weight), x.shape[2] - len(weight)) if x.shape[2] > len(weight) else x.shape[2], 2)
        return (*(x * weight.sum(1) + (0 if bias is None else bias)).split(widths, 2), *rest), None

    monkeypatch.setattr(lasp.layers.short_convolution, "short_convolution_in_parts", convolve)
    config = preset(name, "tiny", num_layers=len(preset(name, "tiny").mixers))
    if name == "linear-transformer":  # its denominator is one more column of values inside the operator
        config = preset(name, "tiny", num_layers=1, normalization="head")
    model, tokens = CausalLM(config), torch.zeros(2, TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss_sum.backward()
    expected = flops_per_token(config, TOKENS)
    assert counter.get_total_flops() == 2 * TOKENS * expected.step
    assert min(expected) > 0


def test_only_known_devices_have_a_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert peak_flops("Some CPU @ 2.0 GHz", "bf16") is None
