"""Hybrids: softmax layers among linear ones, their cache, and the whole model across ranks."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tolerances import relative_error
from torch.utils._pytree import tree_leaves
from world import run

import lasp
from lasp.generate import decode, generate, prefill
from lasp.layers import LinearAttention, SoftmaxAttention
from lasp.models import CausalLM, ModelConfig, preset

T = 24
LENGTHS = [(8, 8, 8), (1, 23, 0), (0, 5, 19)]


def small_model(pattern="LLNL", **overrides):
    shape = {"d_model": 16, "num_layers": 4, "num_heads": 3, "key_dim": 4, "value_dim": 8, "ffn_dim": 12}
    config = preset("hybrid", "tiny", vocab_size=31, layer_pattern=pattern, **{**shape, **overrides})
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.double()


def tokens_and_labels():
    tokens = torch.randint(31, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def test_the_pattern_repeats():
    model = CausalLM(preset("hybrid", "tiny", num_layers=9))
    kinds = "".join("N" if isinstance(block.attention, SoftmaxAttention) else "L" for block in model.blocks)
    assert kinds == "LLLNLLLNL"
    assert all(isinstance(model.blocks[layer].attention, LinearAttention) for layer in (0, 8))
    config = model.config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_any_mixer_can_be_mixed():
    for name in ("retnet", "gated-deltanet", "mamba2", "transnormer"):
        model = CausalLM(preset(name, "tiny", num_layers=2, layer_pattern="LN"))
        assert (
            isinstance(model.blocks[1].attention, SoftmaxAttention) and model.blocks[1].attention.positions is not None
        )
        with torch.no_grad():
            assert model(torch.zeros(1, 5, dtype=torch.int64)).logits.isfinite().all()
    assert CausalLM(preset("linear-transformer", "tiny", layer_pattern="N")).blocks[0].attention.positions is None


@torch.no_grad()
def test_the_softmax_layer_is_softmax_attention():
    layer = small_model().blocks[2].attention
    x = torch.randn(2, T, 16, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(-1, (heads, -1)) for proj, heads in
               ((layer.q_proj, 3), (layer.k_proj, 1), (layer.v_proj, 1)))  # fmt: skip
    q, k = layer.positions(q, k, 100)
    scores = torch.einsum("bthd,bsd->bhts", q, k[:, :, 0]) * 4**-0.5
    weights = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1)
    expected = F.linear(torch.einsum("bhts,bsv->bthv", weights, v[:, :, 0]).flatten(-2), layer.out_proj.weight)
    y, state = layer(x, start=100, output_state=True)
    assert relative_error(y, expected) < 1e-12
    assert relative_error(state, torch.cat((k, v), -1)) < 1e-12
    # Only distances count: other positions give the same, other distances do not.
    assert relative_error(layer(x, start=7)[0], expected) < 1e-12
    _, state = layer(x[:, :9], start=100, output_state=True)
    assert relative_error(layer(x[:, 9:], start=109, state=state)[0], expected[:, 9:]) < 1e-12
    assert relative_error(layer(x[:, 9:], start=110, state=state)[0], expected[:, 9:]) > 1e-4


def test_only_softmax_layers_grow():
    model = small_model()
    prompt, _ = tokens_and_labels()
    sizes = []
    for length in (3, 9, T):
        cache = prefill(model, prompt[:, :length]).cache
        assert cache.states[2].shape == (2, length, 1, 4 + 8)
        sizes.append((length, cache.nbytes - cache.states[2].nbytes))
    assert len({size for _, size in sizes}) == 1
    assert model.bfloat16()(prompt, output_cache=True).cache.states[2].dtype == torch.bfloat16


def test_greedy_equals_recomputing_everything():
    model = small_model()
    tokens, _ = tokens_and_labels()
    generated = generate(model, tokens, 9, temperature=0)
    for _ in range(9):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generated, tokens[:, T:])


@pytest.mark.parametrize("method", ["all_gather", "ulysses"])
def test_across_ranks(method):
    """Loss, every weight's gradient, the cache after a sharded prompt and text decoded on one rank, after a cache."""
    model = small_model(softmax_method=method)
    prompt, labels = tokens_and_labels()
    earlier = prefill(model, prompt[:, :5]).cache
    expected = prefill(model, prompt, cache=earlier)
    text = torch.stack([*decode(model, expected, 6, temperature=0)], 1)
    loss = model(prompt, labels=labels, cache=earlier).loss_sum
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    def work(rank: int) -> list:
        problems = []
        base = lasp.SequenceParallel(dist.group.WORLD)
        for lengths in LENGTHS:
            sp = base.with_lengths(lengths)
            shard = sp.shard(prompt)
            model.zero_grad()
            own = model(shard, labels=sp.shard(labels), cache=earlier, sp=sp).loss_sum
            own.backward()
            pairs = [("loss", sp.comm.sum(own.detach()[None])[0], loss)]
            pairs += [(name, sp.comm.sum(p.grad), gradients[name]) for name, p in model.named_parameters()]
            read = prefill(model, shard, cache=earlier, sp=sp)
            pairs.append(("logits", read.logits, expected.logits))
            states = zip(tree_leaves(read.cache.states), tree_leaves(expected.cache.states), strict=True)
            pairs += [("state", *pair) for pair in states]
            problems += [(lengths, name) for name, a, b in pairs if not relative_error(a, b) < 1e-11]
            if rank == 1 and not torch.equal(torch.stack([*decode(model, read, 6, temperature=0)], 1), text):
                problems.append((lengths, "text"))
        # The control: each rank by itself.
        alone = model(base.shard(prompt), labels=base.shard(labels)).loss_sum.detach()
        assert relative_error(base.comm.sum(alone[None])[0], loss) > 1e-4
        return problems

    assert list(itertools.chain(*run(3, work))) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer_pattern": ""}, "layer_pattern must be of the letters L .* and N .*; got ''"),
        ({"layer_pattern": "LXN"}, "got 'LXN'"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads 4, got 3"),
        ({"softmax_method": "ring"}, "unknown softmax_method 'ring'; known: auto, all_gather, ulysses"),
        ({"layer_pattern": "L"}, "no softmax layer in layer_pattern 'L': leave num_kv_heads"),
        ({"key_dim": 31, "positions": "lrpe"}, "rotary positions need an even key_dim, got 31"),
    ],
)
def test_configuration_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        preset("hybrid", "tiny", **overrides)
