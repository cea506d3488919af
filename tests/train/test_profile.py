"""Traces of chosen steps, and trackers that are not there."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import world
from training_runs import small_config

from lasp.errors import ConfigError
from lasp.train import trainer
from lasp.train.logging.profile import parse_range


def test_the_steps_asked_for_are_traced_on_every_rank(tmp_path: Path) -> None:
    config = small_config(tmp_path, sp=2, steps=4, profile_steps="2:3")
    world.run(2, lambda _rank: trainer.train(config) and None)
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    for path in folder.iterdir():
        with gzip.open(path, "rt") as stream:
            names = {event.get("name") for event in json.load(stream)["traceEvents"]}
        assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names
        assert any(str(name).startswith("aten::") for name in names)


@pytest.mark.parametrize("text", ["3", "3:", ":3", "0:2", "3:2", "1:2:3", "a:b", "-1:2"])
def test_a_range_is_checked(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--profile-steps must be FIRST:LAST"):
        small_config(tmp_path, profile_steps=text).validate()
    assert parse_range("1:1") == (1, 1)
    with pytest.raises(ConfigError, match="starts after the last step, 12"):
        small_config(tmp_path, profile_steps="13:14").validate()


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else known(name))
    with pytest.raises(ConfigError, match=r"--track wandb: wandb is not installed; pip install wandb, or leave it out"):
        small_config(tmp_path, track=("wandb",)).validate()
