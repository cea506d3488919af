"""Print what one compiled block of a 1b model keeps for the backward pass, tensor by tensor, in bytes a token.

    TRITON_INTERPRET=1 python -m benchmarks.kept [FAMILY ...]      (on a CPU; a minute each)

Blocks are traced with the fused kernels and cut into forward and backward as they are for a GPU, without generated
code. Weights and states are not counted; 16-bit copies of weights (`copies`, bytes) stand apart.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import select
from lasp.models import CausalLM, preset
from lasp.models.recomputation import CompiledShapes, compile_block

TOKENS = 64
FAMILIES = ("transnormer", "retnet", "gla", "deltanet", "gated-deltanet", "kda", "mamba2", "hybrid")
KINDS = {"hybrid": (0, 3), "kda": (0, 3)}  # a layer of each


def kept(family: str, layer: int) -> dict[str, Any]:
    config = preset(family, "1b", num_layers=4, backend="triton", vocab_size=64)
    with torch.device("meta"):
        block = CausalLM(config).blocks[layer]
    block = block.to_empty(device="cpu")
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {parameter.data_ptr() for parameter in block.parameters()}
    shapes = {shape for p in block.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch._dynamo.reset()
    compile_block(block, CompiledShapes())
    x = torch.randn(1, TOKENS, config.d_model, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        block(x, 0, None, False, None, None)
    mixer, rows, copies = config.mixer_of(layer), dict[str, int](), 0
    for tensor in tensors.values():
        if tuple(tensor.shape) in shapes:
            copies += tensor.nbytes
        elif tensor.shape[-2:] != (mixer.key_dim, mixer.value_dim) or tensor.shape[1] == TOKENS:  # no states
            name = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            # A view keeps all that it is of.
            rows[name] = rows.get(name, 0) + tensor.untyped_storage().nbytes() // TOKENS
    rows = dict(sorted(rows.items(), key=lambda row: -row[1]))
    found = {"bytes_per_token": sum(rows.values()), "copies": copies, "rows": rows}
    return {"model": f"{family}-1b", "layer": layer, **found}


def main() -> None:
    original = torch.compile
    torch.compile = lambda run, **options: original(run, backend="aot_eager_decomp_partition", **options)  # type: ignore[assignment]
    for dtype in (torch.bfloat16, torch.float32):  # as on a GPU
        select._chosen["neighbours", torch.device("cpu"), dtype, 0, False] = "triton"
    for family in sys.argv[1:] or FAMILIES:
        for layer in KINDS.get(family, (1,)):
            print(json.dumps(kept(family, layer)), flush=True)


if __name__ == "__main__":
    main()
