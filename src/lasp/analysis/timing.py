"""Time of a training step on one rank, by roofline: a kernel takes the longer of its FLOP and its bytes.

Matrix products: 2 FLOP a number and token forward, twice that backward; weights are read once.
Linear attention, chunks of C tokens (docs of the kernels): forward 2 C (K + V) + 4 K V FLOP a token and head, backward
2.5 times that; bytes as in the stages: k, v | q, k, v -> o, then q, do | k, v, do, q -> dq | q, k, v, do -> dk, dv.
Softmax attention, causal, T tokens: 2 T (K + V) / 2 FLOP a token and head forward, 2.5 times that backward.
Where the host walks the chunks (PyTorch kernels), each costs it a moment in two scans forward and two backward.
Everything else (norms, maps, gates, residuals) moves bytes: what it saves is written and read forward, and read, with
gradients as large written and read, backward.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.devices import Device
from lasp.analysis.memory import chunks_of
from lasp.analysis.model import layers
from lasp.kernels.torch.decay import CHUNK
from lasp.models.config import ModelConfig

# Time of other recurrences' kernels relative to scalar decay's, forward and backward: flash-linear-attention 0.6.0 on
# one H100, B=1 T=65536 H=16 K=V=128, ms. By rule and decay.
_KERNEL_MS = {
    ("linear", "none"): 4.63,
    ("linear", "constant"): 4.63,
    ("linear", "head"): 5.69,
    ("linear", "channel"): 14.3,
    ("delta", "none"): 8.51,
    ("delta", "head"): 10.3,
    ("delta", "channel"): 23.7,
}


class Compute(NamedTuple):
    """Seconds of one rank's own work in a step.

    Attributes:
        forward, backward: with nothing but this rank's work.
        attention: of these, attention kernels.
        hidden_backward: work of one layer's backward pass that needs no other rank's state.
        optimizer: AdamW.
    """

    forward: float
    backward: float
    attention: float
    hidden_backward: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer

    def scaled(self, factor: float) -> Compute:
        """The same work, in so many times as many seconds."""
        return Compute(*(factor * seconds for seconds in self))


def kernel(device: Device, flops: float, nbytes: float) -> float:
    """Roofline: seconds."""
    return max(flops / device.flops, nbytes / device.bytes_per_s)


def compute(
    config: ModelConfig,
    device: Device,
    *,
    batch: int,
    tokens: int,
    context: int,
    recomputation: str,
    optimizer_parameters: float,
    softmax_everywhere: bool = False,
    share: float = 1.0,
) -> Compute:
    """One rank's work.

    Args:
        batch, tokens: sequences here, tokens of each here.
        context: tokens of the whole sequence, for softmax attention.
        optimizer_parameters: numbers that this rank updates.
        softmax_everywhere: every mixer's recurrence replaced by softmax attention of the same heads.
        share: of a layer's matrices and heads on this rank, where tensor parallelism divides them; `tokens` are then
            those inside the blocks.
    """
    narrow = 2 if device.precision == "bf16" else 4
    positions = batch * tokens
    forward = backward = attention = hidden = again = 0.0
    for each in layers(config):
        for part, saved in (
            (each.mixer_matrices, each.saved_by_mixer),
            (each.ffn_matrices, each.saved_by_ffn),
        ):
            product = 2.0 * part * positions * share
            moved = saved.nbytes(config.d_model, device.precision) * positions * share
            once = kernel(device, product, narrow * part * share) + 2 * moved / device.bytes_per_s
            forward += once
            backward += kernel(device, 2 * product, 3 * narrow * part * share) + 3 * moved / device.bytes_per_s
            again += once * (recomputation != "none")
        operator = each.operator
        rows = positions * operator.num_heads * share
        if operator.rule == "softmax" or softmax_everywhere:
            work = rows * context * (each.mixer.key_dim + each.mixer.value_dim)
            speed = device.peak_flops * device.softmax_share
            there, back = work / speed, 2.5 * work / speed
        else:
            k, v = operator.key_dim, operator.value_dim
            work = rows * (2 * CHUNK * (k + v) + 4 * k * v)
            slower = _KERNEL_MS[operator.rule, operator.decay] / _KERNEL_MS["linear", "constant"]
            walk = 2 * chunks_of(each, tokens) * device.host_s_per_chunk
            there = slower * kernel(device, work, rows * narrow * (3 * k + 3 * v)) + walk
            sweep = slower * kernel(device, work, rows * narrow * (3 * k + 2 * v))
            rest = slower * kernel(device, 1.5 * work, rows * narrow * (4 * k + 4 * v))
            back = sweep + rest + walk
            hidden = sweep
        forward, backward, attention = forward + there, backward + back, attention + there + back
        again += there * (recomputation != "none")
    head = 2.0 * positions * config.vocab_size * config.d_model
    # lasp.models.loss takes both gradients in the forward pass. Logits are written, read by log softmax, written over
    # by their gradient, which two products read; between, log softmax is written and read in fp32. Backward scales the
    # weight's gradient.
    moved = (5 * narrow + 8.0) * positions * config.vocab_size
    forward += kernel(device, 3 * head, 0) + moved / device.bytes_per_s
    backward += 8.0 * config.vocab_size * config.d_model / device.bytes_per_s
    # AdamW reads weight, gradient and two moments and writes three of them, fp32.
    optimizer = 28.0 * optimizer_parameters / device.bytes_per_s
    launch = device.host_s_per_layer * config.num_layers * (1 + (recomputation != "none") / 3)
    slack = max(0.0, launch - forward - backward - again)
    return Compute(forward, backward + again + slack, attention, hidden, optimizer)


def collective(device: Device, nbytes: float, ranks: int) -> float:
    """Seconds of a collective in which a rank receives `nbytes`, over consecutive ranks; hosts set the pace."""
    if ranks == 1 or nbytes == 0:
        return 0.0
    link = device.inside if ranks <= device.per_node else device.across
    return link.seconds(nbytes)
