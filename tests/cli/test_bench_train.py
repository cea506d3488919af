"""`lasp bench train` as a user runs it, on a CPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from world import run

from lasp.analysis.flops import flops_per_token
from lasp.analysis.model import layer
from lasp.bench import steps
from lasp.bench.profile import each_once
from lasp.bench.steps import BenchTrainConfig, for_device, measure
from lasp.cli.main import main
from lasp.models import preset
from lasp.parallelize import ParallelModel
from lasp.train.config import ModelOptions, OptimizerOptions, ParallelOptions
from lasp.train.optimizer import build_optimizer

SMALL = ["--model.size", "tiny", "--model.overrides", "num_layers", "1", "--device", "cpu", "--steps", "2"]


def test_every_length_is_a_row_and_the_profile_names_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    options = ["--tokens", "64", "128", "--recomputation", "full", "--profile", "--output", str(output)]
    assert main(["bench", "train", *SMALL, *options]) == 0
    text, figures = capsys.readouterr().out, json.loads(output.read_text())
    assert "aten::mm" in text and "recomputation full" in text and "128" in text
    model = preset("transnormer", "tiny", num_layers=1)
    for row, tokens in zip(figures["rows"], (64, 128), strict=True):
        assert row["tokens"] == tokens and len(row["all_steps_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_s"])
        assert row["flops_per_token"] == flops_per_token(model, tokens).step
        assert row["utilisation"] is None  # a CPU has no datasheet here
    assert sum(kernel["share"] for kernel in figures["kernels"]) <= 1 + 1e-9
    assert "x floor" in text and all(figures["parts"][part]["floor_s"] > 0 for part in ("mixer", "feed-forward"))


def test_the_model_stays_as_it_was_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with a training's peak rate, at which random tokens make gates forget all within a few steps."""
    config = BenchTrainConfig(
        model=ModelOptions(family="kda", overrides={"num_layers": 1}), tokens=(64,), steps=2, device="cpu"
    )
    weights: list[tuple[torch.Tensor, torch.Tensor]] = []

    def build(model: ParallelModel, options: OptimizerOptions) -> torch.optim.Optimizer:
        weights[:] = [(each, each.detach().clone()) for each in model.module.parameters()]
        return build_optimizer(model, options)

    def moved() -> float:
        measure(config)
        return max((now - then).abs().max().item() for now, then in weights)

    monkeypatch.setattr(steps, "build_optimizer", build)
    assert 0 < moved() <= 3 * 1.1 * steps.FIRST_STEPS.lr
    monkeypatch.setattr(steps, "FIRST_STEPS", OptimizerOptions())
    assert moved() > 1e-3


def test_kernels_that_a_profiler_gives_to_several_operators_count_once() -> None:
    """65 launches of an optimizer's step, said to be those of 13 operators, as measured; other kernels as they are."""
    work = {("step", "optimizer and clipping"): (13 * 65, 13.0), ("mm", "mixer"): (4, 4.0), ("mm", "norms"): (1, 1.0)}
    once = each_once(work, Counter({"step": 65, "mm": 5}))
    assert once == work | {("step", "optimizer and clipping"): (65, 1.0)}


@pytest.mark.parametrize("family", ["transnormer", "gated-deltanet", "mamba2"])
def test_products_are_those_of_their_part_forward_and_backward(family: str) -> None:
    """Counts 6 operations a weight and token of linear layers; of the mixer those of its chunks beside."""
    config = BenchTrainConfig(
        model=ModelOptions(family=family, overrides={"num_layers": 2}),
        tokens=(64,), steps=1, profile=True, device="cpu", precision="fp32",
    )  # fmt: skip
    model, parts = config.model.build(), measure(config)["parts"]
    layers = [layer(model, index) for index in range(2)]
    found = {name: part["product_flops"] for name, part in parts.items()}
    assert found["feed-forward"] == 64 * 6 * sum(each.ffn_matrices for each in layers)
    assert found["embedding and loss"] == 64 * 6 * model.vocab_size * model.d_model
    assert found["mixer"] >= 64 * 6 * sum(each.mixer_matrices for each in layers)
    assert found["norms"] == found["convolution"] == found["optimizer and clipping"] == found["exchange"] == 0
    assert (parts["convolution"]["s"] > 0) == (family != "transnormer") and parts["norms"]["s"] > 0


@pytest.mark.parametrize(("dp", "sp"), [(1, 2), (2, 1)])
def test_processes_measure_together(dp: int, sp: int, tmp_path: Path) -> None:
    """Both layouts of two processes: the same figures on both, of all groups' tokens, written by the first."""
    config = BenchTrainConfig(
        model=ModelOptions(overrides={"num_layers": 1}),
        parallel=ParallelOptions(dp=dp, sp=sp),
        tokens=(64,),
        steps=2,
        output=tmp_path / "figures.json",
    )
    first, second = run(2, lambda rank: measure(config))
    assert first == second == json.loads((tmp_path / "figures.json").read_text())
    (row,) = first["rows"]
    assert (first["dp"], first["sp"]) == (dp, sp) and len(row["all_steps_s"]) == 2
    assert row["tokens_per_s"] == pytest.approx(64 * dp / row["step_s"])


def test_what_is_not_given_is_chosen_for_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu", "auto"):  # this machine has no GPU, or "auto" is one
        chosen = for_device(device)
        if device == "cpu" or not torch.cuda.is_available():
            assert (chosen.model.size, chosen.precision, max(chosen.tokens)) == ("tiny", "fp32", 4096)
    assert (for_device("cuda").model.size, for_device("cuda").precision) == ("1b", "bf16")
    # What is given stands; every length is shown as it is measured.
    assert (
        main(["bench", "train", "--device", "cpu", "--model.overrides", "num_layers", "1", "--tokens", "64", "128"])
        == 0
    )
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith("transnormer-tiny") and [row.split()[0] for row in rows] == ["64", "128"]
    shown: list[str] = []
    config = BenchTrainConfig(model=ModelOptions(overrides={"num_layers": 1}), tokens=(64,), steps=1, device="cpu")
    figures = measure(config, report=lambda text: shown.append(text) or shown.append(str(len(shown))))  # type: ignore[func-returns-value]
    assert len(figures["rows"]) == 1 and shown[2].split()[0] == "64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "at least 1"),
        (["--tokens", "64", "--sp", "3"], "multiples of --sp 3"),
        (["--tokens", "64", "--sp", "2", "--nproc", "3"], "3 processes cannot be split"),
        (["--model.overrides", "depth", "3"], "no field 'depth'"),
    ],
)
def test_nonsense_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--device", "cpu", "--model.size", "tiny", *options]) == 64
    assert message in capsys.readouterr().err
