"""The language model: any split of a sequence, causality, loss, initial weights, casts."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from lasp.models import NAMES, Cache, CausalLM, preset

T = 23


def model_and_tokens(name, **overrides):
    small = {"d_model": 16, "num_layers": 3, "num_heads": 2, "key_dim": 4, "value_dim": 8, "ffn_dim": 12}
    if name == "mamba2":
        del small["ffn_dim"]
    if name == "hybrid":
        small["layer_pattern"] = "LN"
    model = CausalLM(preset(name, "tiny", vocab_size=31, **{**small, **overrides}))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.double(), torch.randint(31, (2, T), generator=torch.Generator().manual_seed(1))


def run_in_parts(model, tokens, cuts):
    logits, cache = [], None
    for part in tokens.tensor_split(cuts, dim=1):
        out = model(part, cache=cache, output_cache=True)
        logits.append(out.logits)
        cache = out.cache
    return torch.cat(logits, 1), cache


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_any_split_is_one_pass(name):
    model, tokens = model_and_tokens(name)
    whole = model(tokens, output_cache=True)
    for cuts in ([7], [1, 1, 20], [0, T], list(range(1, T))):
        logits, cache = run_in_parts(model, tokens, cuts)
        assert error(logits, whole.logits) < 1e-12
        assert cache.position == T
        for state, expected in zip(tree_leaves(cache.states), tree_leaves(whole.cache.states), strict=True):
            assert error(state, expected) < 1e-12
    # Negative control: the same split without the state, or at the wrong position, is noticed.
    first = model(tokens[:, :7], output_cache=True).cache
    second = model(tokens[:, 7:], cache=Cache(tree_map(torch.zeros_like, first.states), 7)).logits
    assert error(second, whole.logits[:, 7:]) > 1e-3
    if model.config.positions == "none":
        return
    moved = model(tokens[:, 7:], cache=Cache(first.states, 8)).logits
    assert error(moved, whole.logits[:, 7:]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_future_is_unseen(name):
    model, tokens = model_and_tokens(name)
    clean = model(tokens).logits
    changed = tokens.clone()
    changed[:, 11:] = (tokens[:, 11:] + 1) % 31
    assert torch.equal(model(changed).logits[:, :11], clean[:, :11])
    assert (model(changed).logits[:, 11:] - clean[:, 11:]).abs().amin(-1).all()
    # NaN spreads to whatever reads it. Token by token, because a masked matrix product multiplies 0 by NaN.
    model, tokens = model_and_tokens(name, backend="reference", tied_embeddings=False)
    tokens[tokens == 30] = 29
    clean = model(tokens).logits
    model.embedding.weight[30] = torch.nan
    tokens[:, 11] = 30
    if model.config.mixer != "linear-attention":  # gates learned from the input: the op refuses NaN ones
        with pytest.raises(ValueError, match="nan"):
            model(tokens)
        return
    logits = model(tokens).logits
    torch.testing.assert_close(logits[:, :11], clean[:, :11], rtol=0, atol=0)
    assert logits[:, 11].isnan().all()


class Shard:
    """Stands for a rank that holds its tokens at an offset; the op does not see it (T = 0 elsewhere)."""

    size, rank, lengths = 2, 1, (5, T - 5)

    def offset(self, tokens):
        return 5

    def total(self, tokens):
        return T


@pytest.mark.parametrize("name", [name for name in NAMES if preset(name, "tiny").positions != "none"])
@torch.no_grad()
def test_positions_are_global(name, monkeypatch):
    """A shard's positions start at its offset, on top of what the cache has seen."""
    model, tokens = model_and_tokens(name)
    first = model(tokens[:, :5], output_cache=True).cache
    expected = model(tokens[:, 5:], cache=first).logits
    op_name = f"{'normalized_' * (name == 'linear-transformer')}linear_attention_begin"
    from lasp.layers import attention
    from lasp.layers import softmax_attention as softmax_layer

    op = getattr(attention, op_name)
    monkeypatch.setattr(attention, op_name, lambda *args, sp, **kwargs: op(*args, **kwargs))
    softmax = softmax_layer.softmax_attention
    monkeypatch.setattr(softmax_layer, "softmax_attention", lambda *args, sp, **kwargs: softmax(*args, **kwargs))
    out = model(tokens[:, 5:], cache=Cache(first.states, 0), output_cache=True, sp=Shard())
    assert error(out.logits, expected) < 1e-12
    assert out.cache.position == T


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_sum_over_labels(tied):
    model, tokens = model_and_tokens("transnormer", tied_embeddings=tied)
    labels = tokens.roll(-1, 1)
    labels[0, -3:] = -100
    out = model(tokens, labels=labels)
    log_probabilities = model(tokens).logits.log_softmax(-1)
    kept = labels != -100
    expected = -log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].sum()
    assert out.logits is None and out.num_tokens.item() == kept.sum() == 2 * T - 3
    torch.testing.assert_close(out.loss_sum, expected)
    assert model.float()(tokens, labels=labels).loss_sum.dtype == torch.float32
    # A rank without tokens still takes part in the backward pass.
    nothing = model(tokens[:, :0], labels=labels[:, :0])
    nothing.loss_sum.backward()
    assert nothing.loss_sum == 0 and nothing.num_tokens == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_come_from_the_generator_alone(name):
    config = preset(name, "tiny")
    with torch.device("meta"):
        on_meta = CausalLM(config)
    first, second = on_meta.to_empty(device="cpu"), CausalLM(config)
    torch.manual_seed(3)
    first.init_weights(torch.Generator().manual_seed(7))
    second.init_weights(torch.Generator().manual_seed(7))
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    second.init_weights(torch.Generator().manual_seed(8))
    assert not torch.equal(first.embedding.weight, second.embedding.weight)
    tokens = torch.randint(257, (1, 64))
    with torch.no_grad():
        loss = first(tokens, labels=torch.randint(257, (1, 64))).loss_sum / 64
    assert 5.0 < loss < 7.5  # near log 257 = 5.55: the start commits to nothing


@pytest.mark.parametrize("name", ["transnormer", "retnet"])
def test_casts_keep_decays_and_states_exact(name):
    model, tokens = model_and_tokens(name)
    decays = [block.attention.decay(torch.float64) for block in model.blocks]
    model.bfloat16()
    out = model(tokens, output_cache=True)
    assert out.logits.dtype == torch.bfloat16
    assert {state.dtype for state in out.cache.states} == {torch.float32}
    for block, decay in zip(model.blocks, decays, strict=True):
        assert torch.equal(block.attention.decay(torch.float64), decay)


def test_wrong_calls_say_what_is_expected():
    model, tokens = model_and_tokens("retnet")
    with pytest.raises(ValueError, match=r"tokens must be int64 \[B, T\], got torch.int32"):
        model(tokens.int())
    with pytest.raises(ValueError, match=r"tokens' shape \[2, 23\], got torch.int64 \[2, 22\]"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match="has 3 layers, the cache is of one with 0"):
        model(tokens, cache=Cache((), 0))
