"""Attention within one process, over keys that are all here: PyTorch's kernels, and the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from lasp.softmax.blocks import AttentionBlock, Blocks
from lasp.softmax.scores import ScoreOptions, attend_by_scores, reference_block, seen_keys

# Of the memory-efficient kernels' custom_mask_type.
_LOWER_RIGHT = 2
# Bytes that CUDA's kernels read at a time.
_ALIGNMENT = 16


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, blocks: Blocks, options: ScoreOptions, *, backend: str
) -> Tensor:
    """q [B, T, H, D], k [B, S, H_kv, D], v [B, S, H_kv, D_v], sinks [H] or None -> o [B, T, H, D_v]."""
    if not blocks.blocks:
        # Nothing to compute, but every rank must be part of the backward pass of k and v.
        # Their gradients are products, with memory of their own: a sum's is one number, spread out, which no collective
        # may write to.
        nothing = (0 * q).sum() + (0 * k).sum() + (0 * v).sum() + (0.0 if sinks is None else (0 * sinks).sum())
        return q.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3]) + nothing
    outputs = []
    for block in blocks.blocks:
        parts = block.of_queries(q), block.of_keys(k), block.of_keys(v)
        if backend == "reference":
            o = reference_block(*parts, sinks, block.window, options)
        elif options.softcap is not None or sinks is not None:
            o = attend_by_scores(*parts, sinks, block.window, options)
        else:
            o = sdpa_block(*parts, block.window, options)
            if o.is_cuda and not torch.compiler.is_compiling():
                align_gradient(o)
        outputs.append(o.reshape(q.shape[0], _tokens(block), q.shape[2], v.shape[3]))
    if blocks.order is None:
        return outputs[0]
    return torch.cat(outputs, 1).index_select(1, blocks.order.to(q.device))


def _tokens(block: AttentionBlock) -> int:
    return block.queries * len(block.first_queries)


def sdpa_block(q: Tensor, k: Tensor, v: Tensor, window: int | None, options: ScoreOptions) -> Tensor:
    """q [n, T, H, D], k and v [n, S, H_kv, ..], the last query beside the last key -> [n, T, H, D_v]."""
    queries, keys, causal, scale = q.shape[1], k.shape[1], options.causal, options.scale
    if scale <= 0:
        # Kernels multiply what they have masked, -inf, and find the largest score before they do: that takes a scale
        # above 0. Its sign is exact in any dtype, so queries carry it.
        q, scale = q * (-1.0 if scale else 0.0), -scale or 1.0
    if q.is_cuda:
        q, k, v = aligned(q), aligned(k), aligned(v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if window is not None:
        mask = seen_keys(queries, keys, window, q.device)
        # Kernels that take a mask take no shared key heads, and without such a kernel all scores are kept.
        if grouped and q.is_cuda:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            grouped = False
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2)
    if causal and 1 < queries < keys:
        return _lower_right(q, k, v, scale, grouped).transpose(1, 2)
    # A square block needs no mask, and one query sees everything. No comparison of a compiler's numbers is an argument.
    square = False
    if causal and queries == keys:
        square = True
    o = F.scaled_dot_product_attention(q, k, v, is_causal=square, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where it does not lie as CUDA's kernels read it.

    PyTorch does not look, and what reads beside its address ends the process's use of the GPU. Rows of any other width
    it copies itself.
    """
    step = _ALIGNMENT // x.element_size()
    rows = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    # A compiler cannot ask where x begins, and sees to that itself.
    begins = torch.compiler.is_compiling() or x.storage_offset() % step == 0
    if (
        begins
        and (x.shape[-1] == 1 or x.stride(-1) == 1)
        and (x.shape[-1] % step != 0 or all(stride % step == 0 for stride in rows))
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def align_gradient(o: Tensor) -> None:
    """Has the gradient of o, which may be a part of wider rows as that of a concatenation is, come `aligned`."""
    if o.requires_grad:
        o.register_hook(aligned)


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float, grouped: bool) -> Tensor:
    """Causal attention with the last query beside the last key, in a form that fused kernels know.

    As torch.nn.attention.bias.causal_lower_right has it. To import that module brings PyTorch's compiler: over a
    second, and in the middle of a run.
    """
    if q.is_cuda:
        parameters = SDPAParams(q, k, v, None, 0.0, False, grouped)
        if can_use_flash_attention(parameters):
            wide = (F.pad(t, (0, -t.shape[3] % 8)) for t in (q, k, v))
            # This operator's causal is the lower right one.
            o = torch.ops.aten._scaled_dot_product_flash_attention(*wide, 0.0, True, False, scale=scale)[0]
            return o[..., : v.shape[3]]
        if can_use_efficient_attention(parameters):
            o = torch.ops.aten._efficient_attention_forward(
                *(t.transpose(1, 2) for t in (q, k, v)),
                bias=None,
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                max_seqlen_q=None,
                max_seqlen_k=None,
                dropout_p=0.0,
                custom_mask_type=_LOWER_RIGHT,
                compute_log_sumexp=torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)),
                scale=scale,
                seqlen_k=None,
            )[0]
            return o.transpose(1, 2)
    mask = seen_keys(q.shape[2], k.shape[2], None, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
