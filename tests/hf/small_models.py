"""Small models of every type of transformers that lasp.hf splits, with slow decays, and their own code in fp64.

Default decays forget at once, which hides a lost state. transformers computes recurrences and losses in fp32 whatever
the model's dtype; `exactly` makes that fp64, so that its code can be the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.hf.exact import exactly

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}

_LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip

# Model type -> class of the model, class of its configuration, settings.
_ALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _HEADS
        | _DELTA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2, "router_aux_loss_coef": 0.1,
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
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": _COMMON
            | _HEADS
            | _DELTA
            | {
                "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "intermediate_size": 48,
            },
            "vision_config": {
                "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4,
                "out_hidden_size": 32, "num_position_embeddings": 16,
            },
            # Ids that no text has.
            "image_token_id": 200, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203,
        },
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        _HEADS
        | _DELTA
        | {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "router_aux_loss_coef": 0.1,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        _DELTA
        | {
            "num_attention_heads": 4, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
            "intermediate_size": 48,
        },
    ),
    "lara_mini": (
        "LaraMiniForCausalLM",
        "LaraMiniConfig",
        _HEADS
        | _DELTA
        | {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 9,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "router_aux_loss_coef": 0.1,
        },
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        _LATENT
        | {
            "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 8, "linear_num_heads": 4,
        },
    ),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        _LATENT
        | {
            "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
            "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_mtp_layers": 0,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        _HEADS | _MAMBA | {"num_hidden_layers": 2, "intermediate_size": 48, "mamba_d_ssm": 64},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_attention_heads": 4, "n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 16,
            "intermediate_size": 48, "use_mem_rope": True, "use_shared_attention_adapter": True, "adapter_rank": 4,
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        _HEADS
        | {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16,
            "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1,
            "sliding_window": 9,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48,
            "layer_types": ["conv", "conv", "full_attention"],
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48,
            "layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        },
    ),
    "lfm3": (
        "Lfm3ForCausalLM",
        "Lfm3Config",
        _HEADS
        | {
            "num_hidden_layers": 3, "intermediate_size": 48, "sliding_window": 9,
            "layer_types": ["conv", "sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip


def _is_there(kind: str) -> bool:
    """True if this transformers, which is not loaded to find out, has a model type."""
    found = find_spec("transformers")
    folder = kind.removesuffix("_text")
    return found is not None and (Path(str(found.origin)).parent / "models" / folder).is_dir()


SMALL = {kind: settings for kind, settings in _ALL.items() if _is_there(kind)}


def build(kind: str, dtype: torch.dtype = torch.float64, *, router_loss: bool = False, **others: Any) -> Any:
    """A model of a type, the same in every process. router_loss: add that of the experts' balance, if it has one.

    others: settings in place of these.
    """
    # Here, and not for every process of the suite that only collects these tests: it takes seconds.
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, config_class, settings = SMALL[kind]
    torch.manual_seed(0)
    settings = ({} if "text_config" in settings else _COMMON) | settings | others
    config = getattr(transformers, config_class)(**settings)
    if "router_aux_loss_coef" in settings:
        config.output_router_logits = router_loss
    # Decays that are buffers are computed when a model is made.
    torch.set_default_dtype(dtype)
    try:
        model = getattr(transformers, model_class)(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no fp64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-4, -2, parameter.numel()).view_as(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(3.0)  # outputs of small random weights hardly depend on their inputs
    return model.to(dtype)


class Measured(NamedTuple):
    """Results of a batch. gradients: of all parameters that have one."""

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


def recompute(model: Any, *, reentrant: bool) -> Any:
    """The model in training, its layers recomputed in backward, there in fp64 too."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
        def exact(*arguments: Any) -> Any:
            with exactly():
                return function(*arguments)

        return checkpoint(exact, *arguments, use_reentrant=reentrant)

    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, recomputed
    return model.train()
