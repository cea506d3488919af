"""A decoder-only language model over linear attention, with softmax layers where wanted.

Single-device code: `sp` is handed to the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lasp.layers import LayerState, feedforward, norm, sinusoids
from lasp.layers.positions import global_positions
from lasp.models.config import ModelConfig
from lasp.models.initialize import initialize
from lasp.models.loss import IGNORED_LABEL, cross_entropy_sum
from lasp.sequence.arguments import check_flags, check_generator, check_ids, check_kind, whole
from lasp.sequence.sequence_parallel import broadcast_errors
from lasp.sequence.shards import document_bounds

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel


class Cache(NamedTuple):
    """A model's memory of the tokens so far. Only a softmax layer's part grows with their number.

    Attributes:
        states: one per layer: [B, H, K, V] in fp32 (fp64 for an fp64 model), or that and a convolution's window; of
            a softmax layer keys beside values of all tokens, [B, tokens, H_kv, K + V] in the model's dtype.
        position: how many tokens it has seen: the global position of the next one.
    """

    states: tuple[LayerState, ...]
    position: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tree_leaves(self.states))


class LMOutput(NamedTuple):
    """Result of CausalLM.

    Attributes:
        logits: [B, T, vocab], or None when labels were given.
        loss_sum: SUM of the token losses here in nats, scalar, fp32 (fp64 for an fp64 model), or None.
        num_tokens: how many labels here were not -100, int64 scalar tensor, or None.
        cache: after the last token of the whole sequence, on every rank; None unless asked for.
    """

    logits: Tensor | None
    loss_sum: Tensor | None
    num_tokens: Tensor | None
    cache: Cache | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)) where there is one; attention is the configuration's mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm(config.norm, config.d_model, config.norm_eps)
        self.attention = config.build_mixer(layer)
        self.ffn_norm: nn.Module | None = None
        self.ffn: nn.Module | None = None
        if config.ffn != "none":
            self.ffn_norm = norm(config.norm, config.d_model, config.norm_eps)
            self.ffn = feedforward(config.ffn, config.d_model, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        start: int,
        state: LayerState | None,
        output_state: bool,
        cu_seqlens: Tensor | Sequence[int] | None,
        sp: SequenceParallel | None,
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, T, D] whose first token is at global position `start` -> x and the state after the sequence."""
        attended, state = self.attention(
            self.attention_norm(x), start=start, state=state, output_state=output_state, cu_seqlens=cu_seqlens, sp=sp
        )
        x = x + attended
        if self.ffn is None or self.ffn_norm is None:
            return x, state
        return x + self.ffn(self.ffn_norm(x)), state


class CausalLM(nn.Module):
    """Causal language model.

    The weights start from torch's default generator; call `init_weights(generator)` for a start that depends on
    that generator alone. To build a large model in place:
    `with torch.device("meta"): model = CausalLM(config)`, then `model.to_empty(device=...)` and `init_weights`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_kind("config", config, ModelConfig)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = norm(config.norm, config.d_model, config.norm_eps)
        self.head = None if config.tied_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter anew. The same generator state gives the same weights at any number of ranks."""
        check_generator(generator)
        initialize(self, self.config, generator)

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        output_cache: bool = False,
        last_logits: int | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        sp: SequenceParallel | None = None,
    ) -> LMOutput:
        """Logits, or the summed loss where labels are given.

        Args:
            tokens: int64 [B, T]; with `sp`, this rank's tokens of the sequence.
            labels: int64 [B, T], what each token should predict (shifted by the caller, before sharding);
                -100 is ignored.
            cache: continue after the tokens it has seen; with `sp` the same on every rank.
            output_cache: also return the cache after the whole sequence.
            last_logits: compute logits of the last so many tokens only; all by default.
            cu_seqlens: packed documents, see `lasp.linear_attention`: B is 1, every document starts anew, and there
                is no cache before or after.
            sp: the ranks that share the sequence; tokens are their contiguous shards in rank order.

        Raises:
            ValueError: wrong shapes or dtypes; on a CPU also tokens or labels outside the vocabulary.
        """
        with broadcast_errors(sp):
            self._check(tokens, labels, cache, last_logits)
            check_flags(output_cache=output_cache)
            if sp is not None and not callable(getattr(sp, "offset", None)):
                raise ValueError(f"sp must be a SequenceParallel or None, got {type(sp).__name__}")
            if cu_seqlens is not None and (cache is not None or output_cache):
                raise ValueError("packed documents start anew: with cu_seqlens there is no cache, before or after")
            document_bounds(cu_seqlens, tokens.shape[1] if sp is None else sp.total(tokens.shape[1]), tokens.shape[0])
        start = 0 if cache is None else cache.position
        here = start if sp is None else start + sp.offset(tokens.shape[1])
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = x * self.config.d_model**0.5
        if self.config.positions == "sinusoidal":
            x = x + sinusoids(
                self._positions(tokens, here, cu_seqlens), self.config.d_model, base=10000.0, dtype=x.dtype
            )
        states = []
        for layer, block in enumerate(self.blocks):
            x, state = block(x, here, None if cache is None else cache.states[layer], output_cache, cu_seqlens, sp)
            states.append(state)
        seen = start + (tokens.shape[1] if sp is None else sp.total(tokens.shape[1]))
        new_cache = Cache(tuple(states), seen) if output_cache else None
        weight = self.embedding.weight if self.head is None else self.head.weight
        if labels is None:
            if last_logits is not None:
                x = x[:, max(0, x.shape[1] - last_logits) :]
            return LMOutput(F.linear(self.final_norm(x), weight), None, None, new_cache)
        loss_sum = cross_entropy_sum(self.final_norm(x).flatten(0, 1), weight, labels.flatten())
        return LMOutput(None, loss_sum, (labels != IGNORED_LABEL).sum(), new_cache)

    def _positions(self, tokens: Tensor, here: int, cu_seqlens: Tensor | Sequence[int] | None) -> Tensor:
        """fp64 [T], each token's position in its sequence, or in its document."""
        positions = global_positions(here, tokens.shape[1], tokens.device)
        if cu_seqlens is None:
            return positions
        bounds = torch.as_tensor(cu_seqlens, device=tokens.device)
        document = torch.searchsorted(bounds, positions.to(bounds.dtype), right=True) - 1
        return positions - bounds[document]

    def _check(self, tokens: Tensor, labels: Tensor | None, cache: Cache | None, last_logits: int | None) -> None:
        check_ids("tokens", tokens, self.config.vocab_size, "[B, T]")
        if labels is not None:
            check_ids("labels", labels, self.config.vocab_size, "[B, T]", ignored=IGNORED_LABEL)
            if labels.shape != tokens.shape:
                raise ValueError(
                    f"labels must be int64 of the tokens' shape {list(tokens.shape)}, "
                    f"got {labels.dtype} {list(labels.shape)}"
                )
        if last_logits is not None:
            whole("last_logits", last_logits, 0)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"cache must be one that a model gave, or None, got {type(cache).__name__}")
        if cache is not None and len(cache.states) != self.config.num_layers:
            raise ValueError(
                f"this model has {self.config.num_layers} layers, the cache is of one with {len(cache.states)}"
            )
