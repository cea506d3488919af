"""Loads what an earlier version wrote: a run with its checkpoint, an export, built data, and settings.

tests/before was made on a CPU, by `lasp train`, `lasp export` and `lasp data build`, before the modules of this package
were moved; it is never made anew. `next.jsonl`: how that run went on; `generated.txt`: what that export generated.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lasp.cli import main as cli
from lasp.cli.arguments import parse
from lasp.errors import ConfigError
from lasp.models import preset
from lasp.train.config import ModelOptions, TrainConfig
from lasp.train.logging.metrics import read_metrics
from lasp.train.settings_file import from_dict

BEFORE = Path(__file__).parents[1] / "before"


def test_runs_exports_and_data_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def lasp(arguments: str) -> str:
        assert cli.main(arguments.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "good     run/checkpoints/step-00000060" in lasp("verify run") and lasp("report run")
    generated = Path("generated.txt").read_text()
    for folder in ("run", "export"):
        assert lasp(f"generate {folder} --temperature 0 --num-tokens 24") == generated
    lasp("train --resume run --data.path text --data.cache cache --steps 62 --eval-sequences 1")
    went_on, here = (
        [line["loss"] for line in read_metrics(Path(path)) if "loss" in line and line["step"] > 60]
        for path in ("next.jsonl", "run/metrics.jsonl")
    )
    assert here == pytest.approx(went_on, rel=1e-5) and here[0] != pytest.approx(went_on[1], rel=1e-2)
    new = "--sp 1 --steps 1 --seq-len 32 --eval-sequences 1 --data.cache cache --run-dir new"
    assert "that of export" in lasp(f"train --init-from export --data.path data {new}")


def test_overrides_are_added_to_those_of_a_run() -> None:
    """Take what --resume, --init-from and a settings file bring for defaults of the options."""
    earlier = TrainConfig(model=ModelOptions(family="hybrid", overrides={"num_layers": 2, "d_model": 64}))
    for given, expected in (
        ("", earlier.model.overrides),
        (
            "--model.overrides softmax_method auto num_layers 3",
            {"num_layers": 3, "d_model": 64, "softmax_method": "auto"},
        ),
    ):
        found = parse(TrainConfig, [*given.split(), "--steps", "7"], "lasp train", earlier)
        assert found.model.overrides == expected and found.steps == 7 and found.model.family == "hybrid"
    assert earlier.model.overrides == {"num_layers": 2, "d_model": 64}


def test_settings_and_overrides_have_the_names_they_had() -> None:
    kept = json.loads((BEFORE / "settings.json").read_text())
    assert from_dict(TrainConfig, kept["settings"]) == TrainConfig()
    fields = kept["model fields"]
    assert len(fields) == 29
    hybrid = preset("hybrid", "tiny", softmax_method=fields["softmax_method"])  # which was the default
    assert ModelOptions(family="hybrid", overrides=fields).build() == hybrid
    for name in ("num_layers", "positions_in", "layer_pattern"):  # the control: each is read, and by its own name
        changed = {"num_layers": 8, "positions_in": "first", "layer_pattern": "LN"}[name]
        assert ModelOptions(family="hybrid", overrides=fields | {name: changed}).build() != hybrid
        with pytest.raises(ConfigError, match=f"no field '{name}s'"):
            ModelOptions(overrides={f"{name}s": fields[name]}).build()
