"""Packed documents through whole models: each document gives what it gives alone, on one device and across ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from test_causal_lm import error, model_and_tokens
from world import run

import lasp
from lasp.models import NAMES

BOUNDS = (0, 1, 9, 9, 20, 23)


def solve(model, tokens, labels, sp=None, **options):
    model.zero_grad()
    logits = model(tokens, sp=sp, **options).logits.detach()
    model(tokens, labels=labels, sp=sp, **options).loss_sum.backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_alone(name):
    model, tokens = model_and_tokens(name)
    tokens, labels = tokens[:1], tokens[1:]
    alone = [solve(model, tokens[:, a:b], labels[:, a:b]) for a, b in itertools.pairwise(BOUNDS) if a < b]
    expected = torch.cat([logits for logits, _ in alone], 1)
    gradients = {name: sum(g[name] for _, g in alone) for name in alone[0][1]}

    def agrees(logits, found, sp=None):
        expected_here = expected if sp is None else sp.shard(expected)
        worst = max(error(found[n], g) for n, g in gradients.items() if g.norm() > 0)
        return error(logits, expected_here) < 1e-11 and worst < 1e-9

    assert agrees(*solve(model, tokens, labels, cu_seqlens=BOUNDS))
    assert not agrees(*solve(model, tokens, labels)), "the control: without boundaries documents see each other"

    def work(rank):
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(8, 2, 13))
        logits, found = solve(model, sp.shard(tokens), sp.shard(labels), sp, cu_seqlens=torch.tensor(BOUNDS))
        for gradient in found.values():
            dist.all_reduce(gradient)
        return agrees(logits, found, sp)

    assert all(run(3, work))


def test_no_cache_with_documents():
    model, tokens = model_and_tokens("transnormer")
    with pytest.raises(ValueError, match="packed documents start anew"):
        model(tokens[:1], cu_seqlens=BOUNDS, output_cache=True)
