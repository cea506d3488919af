"""The least that each part of a training step must do: operations, and bytes of memory moved, each tensor once a pass.

What `lasp bench train --profile` holds measured times against. Under autocast ("bf16") products, recurrences and
convolutions move 2 bytes a number, the residual stream and the weights of the optimizer 4; in fp32 all move 4.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.devices import Device
from lasp.analysis.model import layers, num_parameters
from lasp.models.config import ModelConfig


class PartCost(NamedTuple):
    """A part's needs in one step, forward and backward."""

    flops: float
    nbytes: float

    def seconds(self, device: Device) -> float:
        """The roofline: the longer of the two times, at the speeds that large kernels reach."""
        return max(self.flops / device.flops, self.nbytes / device.bytes_per_s)


def part_costs(config: ModelConfig, tokens: int, precision: str) -> dict[str, PartCost]:
    """The cost of one sequence of `tokens` tokens on one device, by part; see lasp.bench.profile.PARTS.

    A product reads and writes its activations three times (once forward, twice backward), a recurrence what its kernels
    read and write (lasp.analysis.timing), a convolution and a gated norm their input and output, and backward both
    again with a gradient.
    """
    narrow, d, positions = 2.0 if precision == "bf16" else 4.0, config.d_model, float(tokens)
    mixer, convolution, ffn, norms = ([0.0, 0.0] for _ in range(4))
    for each in layers(config):
        operator, cost = each.operator, each.cost
        values = operator.num_heads * operator.value_dim
        mixer[0] += positions * (6.0 * each.mixer_matrices + 3 * operator.flops(tokens))
        # The sides of a layer's products are those of its matrices, of which all but the last read the input.
        mixer[1] += 3 * narrow * (positions * (2 * d + each.mixer_matrices / d) + each.mixer_matrices)
        mixer[1] += positions * narrow * operator.num_heads * (10 * operator.key_dim + 9 * operator.value_dim)
        convolution[0] += positions * 6.0 * cost.convolved * cost.conv_width
        convolution[1] += positions * 5 * narrow * cost.convolved
        ffn[0] += positions * 6.0 * each.ffn_matrices
        ffn[1] += (
            3 * narrow * (positions * (2 * d * (each.ffn_matrices > 0) + each.ffn_matrices / d) + each.ffn_matrices)
        )
        norms[1] += positions * (1 + (each.ffn_matrices > 0)) * d * (12.0 + 2 * narrow)
        norms[1] += positions * 5 * narrow * values * (operator.rule != "softmax")
    head = 6.0 * positions * config.vocab_size * d
    return {
        "mixer": PartCost(*mixer),
        "convolution": PartCost(*convolution),
        "feed-forward": PartCost(*ffn),
        "norms": PartCost(*norms),
        # Logits are written, read by log softmax and written over by their gradient, which two products read.
        "embedding and loss": PartCost(head, positions * (5 * narrow * config.vocab_size + 12.0 * d)),
        "optimizer and clipping": PartCost(0.0, 32.0 * num_parameters(config)),  # and gradients read once for the norm
    }
