"""The planner and its command: laws that any plan keeps, and refusals."""

from __future__ import annotations

import json
import math

import pytest

from lasp.analysis.devices import DEVICES, device
from lasp.analysis.planner import METHODS, Job, Layout, best, estimate, longest, nodes_of
from lasp.analysis.report import alternatives, plan, row
from lasp.cli import main as cli
from lasp.exchange.all_to_all import AllToAll
from lasp.exchange.doubling import Doubling
from lasp.exchange.hierarchical import Hierarchical
from lasp.models import preset
from lasp.train.errors import ConfigError
from lasp.train.sizes import tokens

CONFIG = preset("transnormer", "1b")
LASP = Layout("lasp", 1, 8, "zero3", "none", "all_gather")


def job(**changes: object) -> Job:
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
    """On two CPU processes: schedules, and whether the sequence or the batch is divided. Not what is clearly slower."""
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "tpu"], "unknown device 'tpu'; known: A100-80G"),
        (["--gpus", "0"], "--gpus must be from 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--seq-len", "long"], "--seq-len must be a number of tokens"),
        (["--model.size", "7b", "--model.family", "gla"], "unknown size '7b' of gla"),
        (["--config", "nowhere.toml"], "cannot read the config file"),
        (["--plot", "nowhere/plan.png"], "the folder of nowhere/plan.png does not exist"),
    ],
)
def test_nonsense_is_refused(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 64
    assert message in capsys.readouterr().err
