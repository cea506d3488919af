"""Small models of every type of transformers that lasp.hf splits, with slow decays, and their own code in fp64.

Default decays forget at once, which hides a lost state. transformers computes recurrences and losses in fp32 whatever
the model's dtype; `exactly` makes that fp64, so that its code can be the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}

# Model type -> class of the model, class of its configuration, settings.
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _HEADS
        | _DELTA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2, "output_router_logits": True,
            "router_aux_loss_coef": 0.1,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        _HEADS
        | _DELTA
        | {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "intermediate_size": 48,
        },
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    ),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        _HEADS | _MAMBA | {"num_hidden_layers": 2, "attn_layer_indices": [1], "intermediate_size": 48},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        _HEADS
        | {
            "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16,
            "intermediate_size": 48,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        _HEADS
        | _MAMBA
        | {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "intermediate_size": 48,
            "shared_intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
        },
    ),
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model of a type, the same in every process."""
    # Here, and not for every process of the suite that only collects these tests: it takes seconds.
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, config_class, settings = SMALL[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(_COMMON | settings | changes))
    model = getattr(transformers, model_class)(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no fp64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-4, -2, parameter.numel()).view_as(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(3.0)  # outputs of small random weights hardly depend on their inputs
    return model.to(dtype)


class exactly(TorchFunctionMode):
    """Within, what asks for fp32 gets fp64."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        options = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*(_wider(value) for value in args), **options)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Measured(NamedTuple):
    """Of a batch. gradients: of all parameters that have one."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def measured(model: Any, *batches: dict[str, Any]) -> Measured:
    """The model's loss on all batches together, that is, the sum of their losses, with logits one after another."""
    model.zero_grad(set_to_none=True)
    losses, logits = [], []
    with exactly():
        for batch in batches:
            output = model(**batch, use_cache=False)
            output.loss.backward()
            losses.append(output.loss.detach())
            logits.append(output.logits.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Measured(torch.stack(losses).sum(), torch.cat(logits, 1), gradients)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Ids of no special token."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
