"""Softmax layers: the attention function that transformers is given for them, and the mask that goes with it.

Registered with transformers under a name, once for every function that models had before. Outside of a split pass
that one is called. The name stays in the configuration: backward looks it up again to recompute a layer.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lasp.hf import library
from lasp.hf.context import MixerFrame, split_frame, split_pass
from lasp.recurrence.untraced import untraced
from lasp.softmax import softmax_attention
from lasp.softmax.gathered import attend_to_gathered

FUNCTION = "attention function"
_names: dict[str, str] = {}
# What would change the scores, and is not computed here.
_UNKNOWN = ("position_bias", "head_mask", "indices", "block_indices")


def name_for(former: str) -> str:
    """The name under which transformers has this library's function; `former` runs outside of split passes."""
    if former in _names.values():  # of a configuration that two models share
        return former
    if former not in _names:
        name = "lasp" + (f"_{len(_names)}" if _names else "")
        library.load("modeling_utils").ALL_ATTENTION_FUNCTIONS.register(name, SplitAttention(former))
        library.load("masking_utils").ALL_MASK_ATTENTION_FUNCTIONS.register(name, SplitMask(former))
        _names[former] = name
    return _names[former]


def former_of(name: str) -> str | None:
    """The function that a name of this library stands for outside of split passes."""
    return next((former for former, given in _names.items() if given == name), None)


class SplitAttention:
    """The attention function: over ranks in a split pass, else `former`."""

    def __init__(self, former: str) -> None:
        self.former = former

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        return _attend(self.former, module, query, key, value, attention_mask, options)


class SplitMask:
    """The mask function: none in a split pass, else `former`'s."""

    def __init__(self, former: str) -> None:
        self.former = former

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _mask(self.former, arguments, options)


@untraced
def _attend(
    former: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, Any]:
    frame = split_frame()
    if frame is None:
        if split_pass() is not None:
            raise RuntimeError(f"{type(module).__name__} attends in a split pass, and lasp.hf does not know this layer")
        functions = library.load("modeling_utils").ALL_ATTENTION_FUNCTIONS
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attended: tuple[Tensor, Any] = functions.get_interface(former, eager)(
            module, query, key, value, mask, **options
        )
        return attended
    frame.wanted.discard(FUNCTION)
    return _across_ranks(frame, query, key, value, mask, options), None


@untraced
def _mask(former: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if split_pass() is not None:
        return None
    return library.load("masking_utils").ALL_MASK_ATTENTION_FUNCTIONS[former](*arguments, **options)


def _across_ranks(
    frame: MixerFrame, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]
) -> Tensor:
    """query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D]."""
    assert frame.shard is not None
    given = [name for name in _UNKNOWN if options.get(name) is not None]
    if given or mask is not None or options.get("dropout") or options.get("is_causal") is False:
        raise RuntimeError(
            f"a softmax layer asks for {', '.join(given) or 'a mask, dropout or tokens that see later ones'}, which "
            "cannot be split"
        )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    sp, documents = frame.split.arguments(frame.shard)
    q, k, v = (tensor.transpose(1, 2).to(dtype) for tensor in (query, key, value))
    if frame.latents is not None and frame.latents.has_gathered:
        scale = options.get("scaling") or q.shape[3] ** -0.5
        return attend_to_gathered(q, k, v, scale=scale, cu_seqlens=documents, sp=sp)
    window, sinks = options.get("sliding_window"), options.get("s_aux", options.get("sinks"))
    o, _state = softmax_attention(
        q,
        k,
        v,
        scale=options.get("scaling"),
        window=window,
        softcap=options.get("softcap"),
        sinks=sinks,
        cu_seqlens=documents,
        sp=sp,
        method=frame.split.method(query.shape[1], window),
    )
    return o
