"""One's own text, as people have it, from files to generated text: every command run from another working folder."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizer_files
from training_runs import SMALL, small_config

from lasp.cli import main as cli
from lasp.errors import ConfigError, DataError
from lasp.train import trainer
from lasp.train.logging.metrics import read_metrics

Command = Callable[[str, str], str]
"""Runs `lasp ARGUMENTS` in the folder named and returns what it printed."""

WORDS = ["red", "hello", "world", "house", "garden", "of", "the", "and", "under", "river"]


def sentences(source: random.Random, num_bytes: int) -> str:
    text = ""
    while len(text) < num_bytes:
        text += " ".join(source.choices(WORDS, k=source.randint(3, 12))) + source.choice([". ", ".\n", "? "])
    return text


def one_file(folder: Path, size: int) -> str:
    (folder / "notes.TXT").write_text(sentences(random.Random(0), size))
    return ""


def ten_books(folder: Path, size: int) -> str:
    for number in range(10):
        (folder / f"book{number}.txt").write_text(sentences(random.Random(number), size // 10))
    return ""


def records(folder: Path, size: int) -> str:
    """JSONL, some of it damaged, and a tokenizer saved with truncation, padding and special tokens."""
    source = random.Random(0)
    lines = [json.dumps({"text": sentences(source, 40).rstrip()}) for _ in range(size // 50)]
    lines[3:3] = ['{"text": null}', '{"text": "</s> is text"}', '{"text": ""}', '{"text": "\\ud800 lone"}']
    (folder / "records.jsonl").write_text("\n".join(lines))
    tokenizer_files.byte_level(folder.parent / "tokenizer.json")
    return "--tokenizer ../tokenizer.json --on-bad-record skip"


def in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def lasp(where: str, arguments: str) -> str:
        (folder / where).mkdir(exist_ok=True)
        capsys.readouterr()
        monkeypatch.chdir(folder / where)
        assert cli.main(arguments.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return lasp


def in_processes(folder: Path) -> Command:
    def lasp(where: str, arguments: str) -> str:
        (folder / where).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "lasp.cli.main", *arguments.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder / where, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return lasp


def walk(lasp: Command, folder: Path, options: str, *, sp: int, steps: int, model: str) -> None:
    said = lasp("a", f"data build ../text --out data --validation-fraction 0.1 {options}")
    if "skip" in options:
        assert "1 empty, 1 skipped, 1 altered, 0 cut" in said
    train = f"--sp {sp} --steps {steps // 2} --optimizer.schedule-steps {steps} --data.path ../a/data --run-dir ../run"
    lasp("b", f"train {train} --seq-len 128 --eval-sequences 8 --sample.num-tokens 8 --data.packed {model}")
    said = lasp("c", f"train --resume ../run --steps {steps}")
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["tokens"] for line in lines] == [4 * 128 * number for number in range(1, steps + 1)]
    asked = said.split("lasp generate ")[1].splitlines()[0]
    assert "def " not in asked and "import " not in asked  # a prompt of this text
    by_run = lasp("d", "generate ../run --num-tokens 40")
    prompt = json.loads((folder / "run" / "checkpoints" / f"step-{steps:08d}" / "state.json").read_text())[
        "sample_prompt"
    ]
    assert prompt and by_run.startswith(prompt) and len(by_run) > len(prompt) + 4
    lasp("d", "export ../run --out exported")
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "d" / "exported", folder / "elsewhere" / "model")
    for name in ("text", "a", "run", "tokenizer.json"):  # what it was made of is gone
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert lasp("e", "generate ../elsewhere/model --num-tokens 40") == by_run


def test_records_with_a_tokenizer_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    small = "--model.overrides " + " ".join(f"{name} {value}" for name, value in SMALL.items())
    options = records(tmp_path / "text", 20_000)
    walk(in_this_process(tmp_path, monkeypatch, capsys), tmp_path, options, sp=1, steps=4, model=small)


@pytest.mark.exhaustive
@pytest.mark.parametrize("text", [one_file, ten_books, records])
def test_from_files_to_an_export_that_stands_alone(tmp_path: Path, text: Callable[[Path, int], str]) -> None:
    (tmp_path / "text").mkdir()
    walk(in_processes(tmp_path), tmp_path, text(tmp_path / "text", 1_000_000), sp=2, steps=50, model="")


def test_a_resumed_run_keeps_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose file was replaced goes on with its own, from text given by a relative path; another one that
    is asked for is refused."""
    (tmp_path / "text").mkdir()
    records(tmp_path / "text", 8000)
    lasp = in_this_process(tmp_path, monkeypatch, capsys)
    small = "--model.overrides " + " ".join(f"{name} {value}" for name, value in SMALL.items())
    options = "--sp 1 --seq-len 32 --data.tokenizer ../tokenizer.json --data.on-bad-record skip --sample.num-tokens 4"
    lasp("a", f"train {options} --steps 2 --data.path ../text --run-dir run {small}")
    other = tokenizer_files.pieces(tmp_path / "tokenizer.json")
    said = lasp("b", "train --resume ../a/run --steps 3")
    assert "after step 2" in said and "1 skipped" in said
    monkeypatch.chdir(tmp_path / "a")
    assert cli.main(["train", "--resume", "run", "--steps", "4", "--data.tokenizer", "../../x"]) == 65
    shutil.copy(other, "other.json")
    assert cli.main(["train", "--resume", "run", "--steps", "4", "--data.tokenizer", "other.json"]) == 66
    assert "was trained with tokenizer file-" in capsys.readouterr().err


def test_weights_bring_their_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new run from an export needs nothing told again; a tokenizer that is another one is refused, built data's too,
    and a run that goes on no longer needs the export."""
    (tmp_path / "text").mkdir()
    records(tmp_path / "text", 8000)
    lasp = in_this_process(tmp_path, monkeypatch, capsys)
    small = "--model.overrides " + " ".join(f"{name} {value}" for name, value in SMALL.items())
    brief = "--sp 1 --seq-len 32 --data.on-bad-record skip --sample.num-tokens 4 --eval-sequences 4"
    options = f"{brief} --data.path ../text"
    lasp("a", f"train {options} --steps 2 --run-dir run --data.tokenizer ../tokenizer.json {small}")
    lasp("a", "export run --out model")
    other = tokenizer_files.pieces(tmp_path / "other.json")
    name = json.loads((tmp_path / "a" / "model" / "config.json").read_text())["tokenizer_id"]
    assert f"tokenizer {name}, that of model" in lasp("a", f"train {options} --steps 2 --run-dir new --init-from model")
    same = "--data.tokenizer ../tokenizer.json"
    assert "that of model" in lasp("a", f"train {options} --steps 2 --run-dir same --init-from model {same}")
    kept = [(tmp_path / "a" / run / "tokenizer.json").read_bytes() for run in ("new", "run")]
    assert kept[0] == kept[1] == (tmp_path / "tokenizer.json").read_bytes()
    lasp("a", "data build ../text --out built --on-bad-record skip")
    for asked in (
        f"{options} --data.tokenizer {other}",
        f"{options} --data.tokenizer bytes",
        f"{brief} --data.path built",
    ):
        assert cli.main(f"train {asked} --run-dir refused --init-from model".split()) == 66
        assert f"model was trained with tokenizer {name}, not " in capsys.readouterr().err
    assert cli.main(["train", "--resume", "new", "--init-from", "model"]) == 64
    shutil.rmtree("model")
    assert "after step 2" in lasp("a", "train --resume new --steps 3")


def test_a_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither before anything is built, nor after; a folder that was there stays, and a run with steps is no failed
    start."""
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, steps=2, seq_len=1_000_000, run_dir=None)
    with pytest.raises(DataError, match="too few for one sequence"):
        trainer.train(config)
    assert not list(tmp_path.glob("runs/*"))
    late = small_config(tmp_path, steps=2)

    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Stepper, "rehearse", broken)
        with pytest.raises(MemoryError):
            trainer.train(late)
    assert late.run_dir is not None and not late.run_dir.exists()
    done = small_config(tmp_path, steps=1, run_dir=tmp_path / "done")
    trainer.train(done)
    before = (tmp_path / "done" / "config.json").read_text()
    with pytest.raises(DataError, match="too few for one sequence"):
        trainer.train(dataclasses.replace(done, steps=2, seq_len=1_000_000), resume=done.run_dir)
    assert (tmp_path / "done" / "config.json").read_text() == before  # a run that cannot go on is as it was
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Stepper, "step", broken)
        with pytest.raises(MemoryError):
            trainer.train(late)
    with pytest.raises(ConfigError, match="is not empty: name another"):  # no checkpoint: nothing to --resume
        trainer.train(late)
