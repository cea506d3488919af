"""A prompt read by several processes and continued by one, and a sharded model's loss, against one process."""

import pytest
import torch
import torch.distributed as dist
from tolerances import relative_error
from torch.utils._pytree import tree_leaves
from world import run

import lasp
from lasp.generate import decode, generate, prefill
from lasp.models import NAMES, CausalLM, preset

pytestmark = pytest.mark.ci

SIZE, T = 3, 24
# Ragged, with an empty last shard: its rank has no logits of its own and the middle rank sends them.
LENGTHS = [None, (7, 17, 0), (0, 5, 19), (24, 0, 0)]
# Which are run with all of them: a recurrence, and softmax layers among others.
WHOLE = ("retnet", "hybrid")


def small_model(name):
    config = preset(
        name, "tiny", vocab_size=31, d_model=16, num_layers=2, num_heads=2, key_dim=4, value_dim=8, ffn_dim=12
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.double()


def tokens_and_labels():
    tokens = torch.randint(31, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        *((name, LENGTHS if name in WHOLE else LENGTHS[1:3]) for name in NAMES),
        *(pytest.param(name, LENGTHS, marks=pytest.mark.exhaustive) for name in NAMES if name not in WHOLE),
    ],
)
def test_prefill_across_ranks_and_decode_on_one(name, cuts):
    model = small_model(name)
    prompt, labels = tokens_and_labels()
    earlier = prefill(model, prompt[:, :5]).cache
    expected = prefill(model, prompt, cache=earlier)
    expected_text = torch.stack([*decode(model, expected, 9, temperature=0)], 1)
    expected_loss = model(prompt, labels=labels, cache=earlier).loss_sum
    seeded = generate(model, prompt, 9, top_k=9, generator=torch.Generator().manual_seed(5))

    def work(rank):
        problems = []
        base = lasp.SequenceParallel(dist.group.WORLD)
        for lengths in cuts:
            sp = base.with_lengths(lengths)
            shard = sp.shard(prompt)
            read = prefill(model, shard, cache=earlier, sp=sp)
            loss = model(shard, labels=sp.shard(labels), cache=earlier, sp=sp).loss_sum.detach()
            dist.all_reduce(loss)
            results = {
                "logits": (read.logits, expected.logits),
                "loss": (loss, expected_loss),
                **{
                    f"state {i}": pair
                    for i, pair in enumerate(
                        zip(tree_leaves(read.cache.states), tree_leaves(expected.cache.states), strict=True)
                    )
                },
            }
            problems += [f"{lengths} {key}" for key, pair in results.items() if not relative_error(*pair) < 1e-12]
            assert read.cache.position == 5 + T
            if rank == 1 and not torch.equal(torch.stack([*decode(model, read, 9, temperature=0)], 1), expected_text):
                problems.append(f"{lengths} text")
            text = generate(model, shard, 9, top_k=9, generator=torch.Generator().manual_seed(5), sp=sp)
            if not torch.equal(text, seeded):
                problems.append(f"{lengths} sampled text")
        # Negative control: equal shards read as if this rank held the first tokens.
        wrong = model(base.shard(prompt), cache=earlier, last_logits=1).logits[:, -1]
        if rank > 0 and relative_error(wrong, expected.logits) < 1e-3:
            problems.append("a shard alone gives the same logits")
        with pytest.raises(ValueError, match="generator seeded alike"):
            generate(model, base.shard(prompt), 2, sp=base)
        return problems

    assert [p for problems in run(SIZE, work) for p in problems] == []
