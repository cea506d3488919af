"""Generation: equal to running the whole model again for each token, seeded, of constant size."""

import pytest
import torch

from lasp.generate import decode, generate, prefill, sample, stream
from lasp.models import NAMES, CausalLM, preset


def small_model(name="transnormer"):
    config = preset(
        name, "tiny", vocab_size=31, d_model=16, num_layers=2, num_heads=2, key_dim=4, value_dim=8, ffn_dim=12
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.double()


def prompt(length=9):
    return torch.randint(31, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_recomputing_everything(name):
    model, tokens = small_model(name), prompt()
    generated = generate(model, tokens, 12, temperature=0)
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generated, tokens[:, 9:])


def test_sampling_is_the_generators():
    model = small_model()

    def draw(seed):
        return generate(model, prompt(), 20, temperature=0.9, top_k=5, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    first = draw(3)
    assert torch.equal(first, draw(3)) and not torch.equal(first, draw(4))
    streamed = stream(model, prompt(), 20, temperature=0.9, top_k=5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack(list(streamed), 1), first)


def test_sample_follows_temperature_and_top_k():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, top_k=1, generator=generator).tolist()) == {1}
    assert set(sample(logits, top_k=2, generator=generator).tolist()) == {1, 3}
    drawn = sample(logits, temperature=2.0, generator=generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, (logits[0] / 2).softmax(-1), rtol=0, atol=0.03)
    assert sample(logits, temperature=0).eq(1).all()


def test_prefill_in_chunks_and_continued_is_one_pass():
    model, tokens = small_model(), prompt(40)
    whole = prefill(model, tokens)
    chunked = prefill(model, tokens, chunk_tokens=7)
    continued = prefill(model, tokens[:, 33:], cache=prefill(model, tokens[:, :33]).cache)
    for other in (chunked, continued):
        assert other.cache.position == 40
        torch.testing.assert_close(other.logits, whole.logits, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other.cache.states, whole.cache.states, rtol=1e-12, atol=1e-14)


def test_the_cache_does_not_grow():
    model = small_model()
    sizes = {prefill(model, prompt(length)).cache.nbytes for length in (1, 10, 1000)}
    # 2 sequences, 2 heads, V = 8, fp64; K = 8 in the first layer, where LRPE doubles it, and 4 in the second.
    assert sizes == {2 * 2 * 8 * 8 * (8 + 4)}
    seen = []
    handle = model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    generate(model, prompt(), 30, temperature=0)
    handle.remove()
    assert seen == [9] + [1] * 29  # one token of work a step, and none after the last


def test_decoding_leaves_gradients_on_and_can_go_on_elsewhere():
    model = small_model()
    read = prefill(model, prompt())
    tokens = decode(model, read, 3, temperature=0)
    next(tokens)
    assert torch.is_grad_enabled()
    assert torch.equal(
        torch.stack([*decode(model, read, 3, temperature=0)], 1), generate(model, prompt(), 3, temperature=0)
    )


def test_errors_say_what_is_expected():
    model = small_model()
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, prompt()[:, :0], 3)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        generate(model, prompt(), 3, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k must be >= 1"):
        stream(model, prompt(), 3, top_k=0)
    with pytest.raises(ValueError, match="max_new_tokens must be >= 0"):
        generate(model, prompt(), -1)
    assert generate(model, prompt(), 0).shape == (2, 0)
