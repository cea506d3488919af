"""Settings: from TOML and back, and every wrong one refused with its name before anything starts."""

import dataclasses
from pathlib import Path

import pytest
from training_runs import small_config

from lasp.errors import ConfigError
from lasp.train.config import ParallelOptions, TrainConfig
from lasp.train.settings_file import differences, from_dict, load_toml, to_dict


def test_a_config_survives_json() -> None:
    config = dataclasses.replace(TrainConfig(), run_dir=Path("runs/x"), seed=3)
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_toml_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 7\n[optimizer]\nlr = 1\n[data]\npath = "texts"\nsuffixes = [".rst"]\n[parallel]\nsp = 4\n')
    config = load_toml(path)
    assert (config.steps, config.optimizer.lr, config.data.path, config.parallel.sp) == (7, 1.0, Path("texts"), 4)
    assert config.data.suffixes == (".rst",) and config.seq_len == TrainConfig().seq_len


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 7", "unknown setting 'stepz'; known: model, data"),
        ("[optimizer]\nrate = 1", r"unknown setting 'rate' in \[optimizer\]"),
        ("steps = 1.5", "steps must be int, got 1.5"),
        ('seq_len = "64Q"', "seq_len must be a number of tokens .* got '64Q'"),
        ('precision = "fp16"', "precision must be one of fp32, bf16, got 'fp16'"),
        ("steps = ", "cannot read the config file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_toml(path)


@pytest.mark.parametrize(
    ("changes", "num_processes", "message"),
    [
        ({"steps": 0}, 1, "--steps must be at least 1, got 0"),
        ({"seq_len": 63, "parallel": ParallelOptions(sp=2)}, 2, "--seq-len must be a multiple of --sp"),
        ({"parallel": ParallelOptions(sp=2)}, 3, "3 processes cannot be split into sequence groups of 2"),
        ({"parallel": ParallelOptions(sp=2, dp=3)}, 4, "--dp 3 x --sp 2 needs 6 processes, but 4 are running"),
        ({"global_batch": 6, "accumulation": 4}, 1, "multiple of dp x accumulation = 1 x 4, got 6"),
        ({"global_batch": 3, "parallel": ParallelOptions(sp=1)}, 2, "dp x accumulation = 2 x 1, got 3"),
        (
            {"parallel": ParallelOptions(sp=1, dp_replicate=2)},
            2,
            "--dp-replicate is of --data-parallel zero2 and zero3",
        ),
        ({"parallel": ParallelOptions(sp=1, cpu_offload=True)}, 2, "--cpu-offload is of"),
        ({"parallel": ParallelOptions(sp=1, data_parallel="zero3", dp_replicate=3)}, 4, "must divide dp = 4, got 3"),
        ({"parallel": ParallelOptions(sp=1, data_parallel="zero2", dp_replicate=4)}, 4, "nothing to spread"),
        ({"parallel": ParallelOptions(ffn_piece_tokens=0)}, 2, "--ffn-piece-tokens must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, changes: dict, num_processes: int, message: str) -> None:
    small_config(tmp_path).validate(1)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small_config(tmp_path), **changes).validate(num_processes)


def test_nan_is_no_learning_rate() -> None:
    config = TrainConfig()
    broken = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=float("nan")))
    with pytest.raises(ConfigError, match=r"--optimizer\.lr"):
        broken.validate()


def test_differences_name_leaves() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: (absent) -> 4"]
