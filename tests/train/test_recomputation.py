"""Recomputed, in pieces or compiled: the same gradients, for less memory."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.pattern_matcher  # which compiling loads: here once, and not in every rank
import world
from test_data_parallel import SMALL, TOKENS, batch, gradients, new_model, whole_gradients
from tolerances import worst
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lasp.distributed.mesh import build_mesh
from lasp.models import NAMES, CausalLM, preset
from lasp.models import recomputation as memory
from lasp.ops.autograd import TRACEABLE
from lasp.parallelize import ParallelModel, parallelize

# The default compiler's front: finds graph breaks, traces gradients, decomposes them and parts the graphs. "aot_eager"
# runs PyTorch's own operators of gradients as they are, of which elu's says that it lies otherwise than it does.
FRONT = "aot_eager_decomp_partition"


def sent(model: ParallelModel) -> int:
    assert model.sp is not None
    return model.sp.counters.sent_bytes


def test_recomputed_blocks_have_the_same_gradients_and_keep_what_was_exchanged() -> None:
    """Equal to the bit. Full recomputation exchanges forward, forward again and back; selective as often as none."""

    def results(_rank: int) -> list[tuple[bool, float]]:
        mesh, found = build_mesh(sp=2, timeout_s=30), []
        for data_parallel in ("ddp", "zero3"):
            runs = {}
            for recomputation in ("none", "selective", "full"):
                options: dict[str, Any] = {
                    "data_parallel": data_parallel,
                    "recomputation": recomputation,
                    "exchange": "all_gather",
                }
                model = parallelize(new_model(), mesh, **options)
                gradients(model, 0)
                runs[recomputation] = whole_gradients(model.module), sent(model)
            reference, bytes_once = runs["none"]
            for values, bytes_sent in (runs["selective"], runs["full"]):
                same = all(torch.equal(values[name], reference[name]) for name in reference)
                found.append((same, bytes_sent / bytes_once))
        return found

    assert world.run(2, results) == [[(True, 1.0), (True, 1.5)] * 2] * 2


def saved_bytes(**options: Any) -> int:
    """Bytes kept for the backward pass of one sequence in this process."""
    model = parallelize(new_model(), None, **options)
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    text = batch(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.training(text[:, :-1], labels=text[:, 1:].contiguous()).loss_sum
    loss.backward()
    return sum(kept.values())


def test_what_is_recomputed_is_not_kept() -> None:
    plain, pieces = saved_bytes(), saved_bytes(ffn_piece_tokens=8)
    full = saved_bytes(recomputation="full")
    assert full < pieces < 0.8 * plain
    assert full < 0.3 * plain


@pytest.mark.ci
def test_compiled_blocks_keep_no_inputs_of_products_that_follow_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: as the compiler's own rule has it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=FRONT))
    kept = []
    for rule in (memory._KEEP_WHAT_PRODUCTS_READ, True):
        torch._dynamo.reset()
        monkeypatch.setattr(memory, "_KEEP_WHAT_PRODUCTS_READ", rule)
        kept.append(saved_bytes(compile=True))
    assert kept[0] < 0.8 * kept[1]


def test_channel_mixers_in_pieces_change_nothing() -> None:
    """Pieces that do not divide the tokens, of one token, and more than there are."""
    reference = parallelize(new_model(), None)
    gradients(reference, 0)
    for piece in (1, 7, 1000):
        model = parallelize(new_model(), None, ffn_piece_tokens=piece, recomputation="full" if piece == 7 else "none")
        gradients(model, 0)
        assert worst(whole_gradients(model.module), whole_gradients(reference.module))[1] < 2e-6


@pytest.mark.parametrize(
    "options", [{"recomputation": "selective", "compile": True}, {"recomputation": "full", "ffn_piece_tokens": 8}]
)
def test_a_copy_has_weights_and_gradients_of_its_own(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An average of the weights, kept beside the model that trains, needs it: also once that has run."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    single = CausalLM(preset("transnormer", "tiny", **{**SMALL, "num_layers": 1}))
    model, reference = parallelize(deepcopy(single), None, **options), parallelize(single, None)
    gradients(model, 0)
    gradients(reference, 0)
    copies = deepcopy(model.module), pickle.loads(pickle.dumps(model.module))
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    model.module.zero_grad()
    for copy in copies:
        assert all(
            type(block.forward) is type(other.forward)
            for block, other in zip(copy.blocks, model.module.blocks, strict=True)  # type: ignore[arg-type]
        )
        copy.zero_grad()
        gradients(parallelize(copy, None), 0)
        assert worst(whole_gradients(copy), whole_gradients(reference.module))[1] < 2e-6
    assert all(parameter.grad is None for parameter in model.module.parameters())


@pytest.mark.parametrize("family", NAMES)
def test_every_model_is_copied_and_pickled(family: str) -> None:
    model, tokens = CausalLM(preset(family, "tiny")), torch.arange(20)[None]
    expected = model(tokens).logits
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copy(tokens).logits, expected)
        with torch.no_grad():
            copy.embedding.weight.zero_()
        assert not torch.equal(copy(tokens).logits, expected), "the control: its weights are its own"
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    "num_layers", [pytest.param(1, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.exhaustive)]
)
def test_compiled_blocks_exchange_inside_the_graph(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph=True refuses graph breaks; the same gradients and bytes, recomputed or not, sharded or not. Under DDP a
    block is one graph: the compiler would cut this one at every MB of gradients, usually at every 25, and keep what
    crosses the cut."""
    sizes = {**SMALL, "d_model": 256, "ffn_dim": 1024, "num_layers": num_layers}
    monkeypatch.setattr(
        DistributedDataParallel, "__init__", partialmethod(DistributedDataParallel.__init__, bucket_cap_mb=1)
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=FRONT))

    def results(_rank: int) -> dict[str, tuple[float, int, int]]:
        mesh, found = build_mesh(sp=2, timeout_s=60), {}
        kinds: dict[str, dict[str, Any]] = {
            "plain": {"compile": False},
            "selective": {"recomputation": "selective", "data_parallel": "zero3"},
            "full": {"recomputation": "full"},
        }
        reference: dict[str, Tensor] = {}
        for name, options in kinds.items():
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            module = CausalLM(preset("transnormer", "tiny", **sizes))
            module.init_weights(torch.Generator().manual_seed(1))
            model = parallelize(module, mesh, **{"compile": True, "exchange": "all_gather", **options})
            gradients(model, 0)
            graphs = int(torch._dynamo.utils.counters["aot_autograd"]["total"])
            reference = reference or whole_gradients(model.module)
            found[name] = worst(whole_gradients(model.module), reference)[1], sent(model), graphs
        return found

    for found in world.run(2, results, deadline_s=200):
        bytes_once = found["plain"][1]
        assert max(error for error, *_ in found.values()) < 2e-6, found
        assert {name: count / bytes_once for name, (_, count, _) in found.items()} == {
            "plain": 1.0,
            "selective": 1.0,
            "full": 1.5,
        }
        one, ddp = found["selective"][2], found["full"][2]
        assert ddp == one and (ddp == num_layers or not TRACEABLE), found  # then they break around every scan


def compiled_and_not(family: str, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> tuple[ParallelModel, ParallelModel]:
    """A model of one process whose blocks are compiled, by the compiler's front alone, and the same model as it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=FRONT))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = []
    for _ in range(2):
        module = CausalLM(preset(family, "tiny", **{"vocab_size": 50, **sizes}))
        module.init_weights(torch.Generator().manual_seed(1))
        models.append(module)
    return parallelize(models[0], None, compile=True), parallelize(models[1], None)


FAMILIES = (
    "linear-transformer", "transnormer", "retnet", "gla", "deltanet", "gated-deltanet", "kda", "mamba2", "hybrid"
)  # fmt: skip


# Of eight tokens a graph is half as large, and the compiler's work, as of the 32 of a batch.
@pytest.mark.parametrize(
    ("family", "tokens"),
    [pytest.param(family, 8, marks=pytest.mark.ci) for family in ("mamba2", "gla", "gated-deltanet")]
    + [pytest.param(f, TOKENS, marks=pytest.mark.exhaustive) for f in FAMILIES],
)
def test_every_family_compiles_on_one_process(
    family: str, tokens: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    num_layers = 4 if family == "hybrid" else 1  # one of each kind
    compiled, plain = compiled_and_not(family, monkeypatch, num_layers=num_layers)
    recwarn.clear()
    text = batch(0)[:, : tokens + 1]
    for model in (compiled, plain):
        model.training(text[:, :-1].contiguous(), labels=text[:, 1:].contiguous()).loss_sum.backward()
    ours = Path(memory.__file__).parents[1]
    assert [str(warning.message) for warning in recwarn if ours in Path(warning.filename).parents] == []
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)], "the compiler's, of our code"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert worst(whole_gradients(compiled.module), whole_gradients(plain.module))[1] < 2e-6


@pytest.mark.parametrize("most", [pytest.param(2, marks=pytest.mark.ci), pytest.param(8, marks=pytest.mark.exhaustive)])
def test_any_number_of_lengths_trains_and_those_that_are_not_compiled_are_told_of(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most != 8:  # as it is, and a compilation takes seconds
        monkeypatch.setattr(memory, "_MAX_SHAPES", most)
    compiled, plain = compiled_and_not("linear-transformer", monkeypatch, **{**SMALL, "num_layers": 1})
    counts: list[int] = []

    def train_on(lengths: range) -> None:
        for length in lengths:
            tokens = batch(length)[:1, :length]
            first, second = (model.training(tokens, labels=tokens).loss_sum.item() for model in (compiled, plain))
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            assert abs(first - second) < 1e-5 * abs(second)

    with pytest.warns(UserWarning, match=f"compiled for {most} shapes") as warned:
        train_on(range(4, 4 + most + 3))
    assert len([each for each in warned if "compiled for" in str(each.message)]) == 1
    assert counts[most - 1] > counts[most - 2] > 0 and counts[most:] == counts[most - 1 : most] * 3


OVER_RANKS = ("deltanet", "gla", "kda", "retnet", "linear-transformer", "transnormer", "gated-deltanet")


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(family, marks=pytest.mark.ci) for family in ("mamba2", "hybrid")),
        *(pytest.param(family, marks=pytest.mark.exhaustive) for family in OVER_RANKS),
    ],
)
def test_every_family_compiles_over_ranks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs break around what the compiler cannot follow; a user is told nothing, and gradients are the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=FRONT))

    def results(_rank: int) -> tuple[float, int, list[str]]:
        mesh = build_mesh(sp=2, timeout_s=60)
        found, graphs = [], 0
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for compile_ in (True, False):
                sizes = {"vocab_size": 50, "num_layers": 1, "layer_pattern": "N"} if family == "hybrid" else {}
                module = CausalLM(preset(family, "tiny", **{"vocab_size": 50, "num_layers": 1, **sizes}))
                module.init_weights(torch.Generator().manual_seed(1))
                model = parallelize(module, mesh, compile=compile_)
                gradients(model, 0)
                graphs = graphs or int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
                found.append(whole_gradients(model.module))
        return worst(*found)[1], graphs, [str(each.message) for each in said if "lasp" in each.filename]

    for error, graphs, said in world.run(2, results, deadline_s=200):
        assert error < 2e-6 and graphs > 0 and said == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"recomputation": "some"}, "none, selective, full"), ({"ffn_piece_tokens": 0}, "ffn_piece_tokens must be >= 1")],
)
def test_unknown_ways_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(new_model(), None, **options)
