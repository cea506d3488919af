"""The planner and its command: laws that any plan keeps, and refusals."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from training_runs import write_text

from lasp.analysis.devices import DEVICES, described, device
from lasp.analysis.measured import MEASURED
from lasp.analysis.planner import METHODS, Job, ParallelLayout, best, estimate, longest, nodes_of
from lasp.analysis.report import alternatives, plan, row
from lasp.cli import main as cli
from lasp.cli import train as train_command
from lasp.errors import ConfigError
from lasp.exchange.schedules.all_to_all import AllToAll
from lasp.exchange.schedules.doubling import Doubling
from lasp.exchange.schedules.hierarchical import Hierarchical
from lasp.models import preset
from lasp.train.settings_file import read_toml
from lasp.train.sizes import tokens

CONFIG = preset("transnormer", "1b")
LASP = ParallelLayout("lasp", 1, 8, "zero3", "none", "all_gather")


def job(**changes: Any) -> Job:
    return Job(**{"config": CONFIG, "device": device("h100"), "devices": 8, "seq_len": 1 << 17, "batch": 1, **changes})


def test_what_is_received_depends_on_length_but_for_lasp():
    short, long = job(), job(seq_len=64 << 17)
    assert estimate(short, LASP).received_bytes == estimate(long, LASP).received_bytes > 0
    for method in ("ulysses", "megatron", "ring"):
        other = LASP._replace(method=method, schedule="-")
        assert estimate(long, other).received_bytes == 64 * estimate(short, other).received_bytes


def test_recommended_is_the_fastest_that_fits():
    found = plan(job())
    fitting = alternatives(job())
    assert found["recommended"]["tokens_per_s"] == max(each["tokens_per_s"] for each in fitting)
    assert all(each["memory_bytes"] <= found["capacity_bytes"] for each in fitting)
    ours = found["recommended_for_lasp_train"]
    assert (ours["sharding"], ours["recomputation"]) == ("ddp", "none") and ours in fitting
    assert plan(job(seq_len=1 << 30))["recommended_for_lasp_train"] is None


def test_what_predictions_do_not_tell_apart_is_said():
    """Two CPU processes: schedules, and whether the sequence or the batch is divided. Not what is clearly slower."""
    found = plan(job(config=preset("transnormer", "tiny"), device=device("cpu"), devices=2, seq_len=4096, batch=2))
    best, ties = found["recommended_for_lasp_train"], found["ties_for_lasp_train"]
    assert {"ring", "all_gather", "doubling"} <= {each["schedule"] for each in (best, *ties)}
    assert {1, 2} == {each["dp"] for each in (best, *ties)}
    assert best not in ties and all(best["step_s"] <= each["step_s"] <= 1.05 * best["step_s"] for each in ties)
    assert plan(job(seq_len=1 << 36))["ties"] == [], "nothing fits"


def test_the_work_does_not_grow_with_the_devices(monkeypatch):
    """Counted, not timed: to sum a schedule's traffic over all ranks would make the largest plans take minutes."""
    calls = []
    for schedule in (AllToAll, Doubling, Hierarchical):
        traffic = schedule.traffic
        monkeypatch.setattr(
            schedule, "traffic", lambda *given, real=traffic, **rest: calls.append(1) or real(*given, **rest)
        )
    plan(job(devices=1 << 14, seq_len=1 << 26, batch=2))
    assert len(calls) < 2000


def test_the_longest_sequence_fits_and_twice_of_it_does_not():
    for method in ("lasp", "ulysses"):
        most = longest(CONFIG, device("a100-80g"), 8, method)
        assert best(job(device=device("a100-80g"), seq_len=most), method).fits
        assert not best(job(device=device("a100-80g"), seq_len=2 * most), method).fits


def test_longest_grows_with_devices_for_lasp_only_where_heads_end():
    lasp = [longest(CONFIG, device("h100"), devices, "lasp") for devices in (16, 64)]
    assert lasp[1] == 4 * lasp[0]
    assert longest(CONFIG, device("h100"), 64, "ulysses") == 0, "64 ranks do not divide 16 heads"


def test_every_model_on_every_device_has_a_plan():
    for name, size in (("hybrid", "1b"), ("gated-deltanet", "1b"), ("mamba2", "0.4b"), ("linear-transformer", "7b")):
        for kind in DEVICES.values():
            found = plan(job(config=preset(name, size), device=kind, seq_len=1 << 12))
            values = [entry["step_s"] for entry in found["methods"] if "step_s" in entry]
            assert values and all(math.isfinite(value) and value > 0 for value in values)
            assert [entry["method"] for entry in found["methods"]] == list(METHODS)


def test_softmax_layers_exchange_as_they_do_in_training():
    """Count what the last rank receives: of tokens for heads, where they divide, less than of all keys and values."""

    def received(heads: int, **changes) -> float:
        config = preset("hybrid", "1b", num_heads=heads, num_kv_heads=heads, **changes)
        return estimate(job(config=config), LASP).received_bytes

    gathered = received(32, softmax_method="all_gather")
    assert received(32) == received(32, softmax_method="ulysses") < gathered
    assert received(36) == received(36, softmax_method="all_gather")


def test_parts_add_up():
    values = row(estimate(job(), LASP))
    assert sum(values["memory"].values()) == pytest.approx(values["memory_bytes"])
    assert values["compute_s"] + values["exposed_communication_s"] == pytest.approx(values["step_s"])
    assert nodes_of(device("h100"), 20) == (8, 8, 4)


def test_lengths():
    assert [tokens(text, "--n") for text in ("4096", "64K", "1m", "1G")] == [4096, 1 << 16, 1 << 20, 1 << 30]
    for text in ("", "K", "-1", "0", "1.5K", "many", "2000G"):
        with pytest.raises(ConfigError, match="--n must be a number of tokens"):
            tokens(text, "--n")


def test_json(capsys):
    assert cli.main(["plan", "--gpus", "64", "--seq-len", "1M", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["method"] == "lasp" and found["seq_len"] == 1 << 20
    assert "reason" in next(entry for entry in found["methods"] if entry["method"] == "ulysses")
    assert any(basis.startswith("assumed") for basis in found["rests_on"].values())


def test_what_nobody_measured_is_marked(capsys):
    """Tells by model, device and way; such numbers have a range."""
    for family, kind, compiled, is_measured in (
        ("transnormer", "H200", True, True),
        ("linear-transformer", "H200", True, False),
        ("transnormer", "A100-80G", True, False),
        ("transnormer", "H100", False, False),
        ("kda", "H200", False, True),
    ):
        where = job(config=preset(family, "1b"), device=device(kind), devices=1, seq_len=1 << 14, batch=1)
        found = plan(where, compiled=compiled)
        assert (found["measured"] is not None) == is_measured
        assert found["rests_on"]["steps"].startswith("measured" if is_measured else "not measured")
        low, high = found["range"]
        assert low == high == 1.0 if is_measured else low < 0.9 * high
    assert cli.main(["plan", "--model.family", "gla", "--model.size", "1b", "--seq-len", "16K"]) == 0
    assert capsys.readouterr().out.count("not measured") >= 3


def test_the_files_of_measured_steps_are_there():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    assert all(list(results.glob(steps.source)) for steps in MEASURED)


def test_table_and_plot(capsys, tmp_path):
    image = tmp_path / "plan.png"
    assert cli.main(["plan", "--seq-len", "16K", "--plot", str(image)]) == 0
    said = capsys.readouterr().out
    assert (
        "Recommended: " in said
        and "With lasp train's defaults: " in said
        and "What the numbers rest on" in said
        and image.stat().st_size > 10_000
    )


def printed_command(said: str) -> list[str]:
    """The options of the `lasp train` line that a plan prints."""
    (line,) = re.findall(r"lasp train (--.*)", said)
    return shlex.split(line)


@pytest.mark.parametrize(
    "arguments",
    [
        "--gpus 64 --gpu h100 --seq-len 1M",
        "--gpus 8 --seq-len 256K --model.size 7b --precision fp32",
        "--gpus 16 --gpu h200 --seq-len 64K --batch 4 --model.family hybrid",
        "--gpus 4 --gpu cpu --seq-len 4K --batch 2 --model.size tiny --model.overrides layer_pattern LN num_layers 2",
        "--gpus 4 --gpu cpu --config run.toml",
    ],
)
def test_the_printed_command_is_one_that_train_takes(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = 'dp = 4\ndata_parallel = "zero3"\ndp_replicate = 2\ncpu_offload = true\n'
    Path("run.toml").write_text(f"global_batch = 6\naccumulation = 3\n[parallel]\n{layout}")
    assert cli.main(["plan", *arguments.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = printed_command(found["command"])
    config, best = train_command.arguments_of(options).settings, found["recommended_of_lasp_train"]
    config.validate(found["devices"])
    assert (config.seq_len, config.global_batch, config.precision) == (
        found["seq_len"],
        found["batch"],
        found["precision"],
    )
    parallel = config.parallel
    assert [best[name] for name in ("dp", "sp", "sharding", "recomputation")] == [
        parallel.dp,
        parallel.sp,
        parallel.data_parallel,
        parallel.recomputation,
    ]
    assert config.model.build(vocab_size=257).mixer_of(0).kind == "linear-attention" and config.accumulation == 1


def test_the_printed_command_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    plan_of = "plan --gpu cpu --gpus 1 --seq-len 64 --model.size tiny --model.overrides num_layers 1 decay retnet"
    assert cli.main(plan_of.split()) == 0
    options = printed_command(capsys.readouterr().out)
    few = [
        "--steps",
        "1",
        "--eval-sequences",
        "4",
        "--sample.num-tokens",
        "4",
        "--run-dir",
        "run",
        "--data.path",
        "text",
    ]
    assert cli.main(["train", *few, *options]) == 0
    assert "1 process on cpu: dp 1 x sp 1" in capsys.readouterr().out


def test_precision_and_a_described_gpu_change_the_plan() -> None:
    values = read_toml(Path(__file__).parents[2] / "examples" / "gpu" / "l40s.toml", "description of a GPU")
    small = described(values)
    wide = small.training_in("fp32")
    assert (small.precision, small.peak_flops, wide.peak_flops) == ("bf16", 362e12, 91.6e12)
    assert wide.training_in("bf16") == small and "as described for L40S" in wide.sources["flops"]
    layout = ParallelLayout("lasp", 1, 8, "zero3", "full", "all_gather")
    narrow, full = (estimate(job(device=kind), layout) for kind in (small, wide))
    assert full.compute_s > 2 * narrow.compute_s and full.memory.total > narrow.memory.total
    # An eighth of a device's memory is left to what is no tensor.
    assert all(kind.memory_share == 0.88 for kind in (*DEVICES.values(), small))
    for key in ("memory_gib", "processors"):
        with pytest.raises(ValueError, match=f"{key} must be a number above 0, got 0"):
            described(values | {key: 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "tpu"], "unknown device 'tpu'; known: A100-80G"),
        (["--gpus", "0"], "--gpus must be from 1"),
        (["--batch", "0"], "--global-batch must be at least 1"),
        (["--seq-len", "long"], "--seq-len must be a number of tokens"),
        (["--model.size", "7b", "--model.family", "gla"], "unknown size '7b' of gla"),
        (["--config", "nowhere.toml"], "cannot read the config file"),
        (["--gpu", "nowhere.toml"], "cannot read the description of a GPU nowhere.toml"),
        (
            ["--gpu", str(Path(__file__).parents[2] / "configs" / "transnormer-tiny.toml")],
            "a GPU has no 'data'; it has",
        ),
        (["--plot", "nowhere/plan.png"], "the folder of nowhere/plan.png does not exist"),
    ],
)
def test_nonsense_is_refused(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 64
    assert message in capsys.readouterr().err
