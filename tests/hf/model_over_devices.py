"""A model of a type over two processes of one device, and in one, against transformers' own code: run by torchrun.

    torchrun --nproc-per-node 2 tests/hf/model_over_devices.py cpu|cuda KIND

Over gloo, so that both processes can be on one GPU. The first rank prints, as JSON, for each dtype how far loss, logits
and gradients are from transformers' in fp64: of transformers in that dtype, of this library in one process (`one`) and
over the ranks (`two`), the largest of any rank; and of a rank's tokens by themselves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1])]

from hf.small_models import Measured, build, exactly, tokens  # noqa: E402
from tolerances import relative_error  # noqa: E402

import lasp  # noqa: E402
import lasp.hf  # noqa: E402

# As wide as kernels take heads, and dense: in 16 bits experts would be chosen anew.
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_experts": 0},
    "qwen3_5_text": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "mamba2": {"head_dim": 64, "num_heads": 8, "state_size": 64, "chunk_size": 64},
    "bamba": {"mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64},
    "nemotron_h": {"mamba_head_dim": 64, "ssm_state_size": 64, "chunk_size": 64},
    "granitemoehybrid": {"mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64, "num_local_experts": 0},
    "minimax": {"head_dim": 64, "block_size": 64, "num_local_experts": 2},  # both are chosen
    "kimi_linear": {
        "linear_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "mlp_layer_types": ["dense", "dense"],
    },
    "lfm2": {},
}  # fmt: skip


def solve(model: Any, batch: dict[str, Any], *, exact: bool = False) -> Measured:
    """Loss, logits and gradients in the model's dtype, or in fp64 throughout."""
    if exact:
        with exactly():
            output = model(**batch, use_cache=False)
            output.loss.backward()
    else:
        output = model(**batch, use_cache=False)
        output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Measured(output.loss.detach(), output.logits.detach(), gradients)


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def errors(found: Measured, exact: Measured, here: slice = slice(None)) -> list[float]:
    """Errors of loss, logits and all gradients together."""
    return [
        relative_error(found.loss, exact.loss),
        relative_error(found.logits, exact.logits[:, here]),
        relative_error(flat(found.gradients), flat(exact.gradients)),
    ]


def compared(device: torch.device, kind: str) -> dict[str, list[float]]:
    sp = lasp.SequenceParallel(dist.group.WORLD)
    length = 777 if device.type == "cuda" else 150
    ids = tokens(2, length).to(device)
    batch = {"input_ids": ids, "labels": ids}
    lengths = (length // 3, length - length // 3)
    here = slice(0, lengths[0]) if sp.rank == 0 else slice(lengths[0], length)

    whole = build(kind, hidden_size=256, **WIDE[kind])

    def model(dtype: torch.dtype) -> Any:
        made = build(kind, dtype, hidden_size=256, **WIDE[kind])
        made.load_state_dict(whole.state_dict())  # random numbers depend on the dtype
        return made.to(device)

    exact = solve(model(torch.float64), batch, exact=True)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        found[f"{name} theirs"] = errors(solve(model(dtype), batch), exact)
        one = lasp.hf.parallelize(model(dtype), None)
        found[f"{name} one"] = errors(solve(one, lasp.hf.shard(batch, None)), exact)
        split = solve(lasp.hf.parallelize(model(dtype), sp), lasp.hf.shard(batch, sp, lengths))
        gradients = {name: sp.sum(gradient.double()) / 2 for name, gradient in split.gradients.items()}
        found[f"{name} two"] = errors(split._replace(gradients=gradients), exact, here)
    with torch.no_grad():
        alone = model(torch.float32)(ids[:, here]).logits
    found["alone"] = [relative_error(alone, exact.logits[:, here])]
    return found


def main() -> None:
    device = torch.device(sys.argv[1])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("gloo")
    found = compared(device, sys.argv[2])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        largest = {
            name: [max(values) for values in zip(*(row[name] for row in gathered), strict=True)] for name in found
        }
        print(json.dumps(largest))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
