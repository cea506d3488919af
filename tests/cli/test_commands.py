"""The command line: help, options, errors with their exit codes; all without training."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import small_config, write_text

from lasp.cli import main as cli
from lasp.cli import train as train_command
from lasp.errors import CheckpointError, ConfigError
from lasp.train import sample, trainer
from lasp.train.checkpoint import export
from lasp.train.config import TrainConfig
from lasp.train.logging.metrics import read_metrics


def test_help_names_every_command_without_loading_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("train", "generate", "check"))
    # Nor PyTorch: whatever takes long to load is loaded behind the guard, where Ctrl-C is no fault.
    names = ("tyro", "matplotlib", "torch", "torch._dynamo", "lasp")
    script = "import sys; sys.argv[0] = '/bin/lasp'; import lasp.cli.main; "
    script += f"print([name for name in {names} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout == "['lasp']\n"


def test_an_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tarin"]) == 64
    assert "no command 'tarin'; known: train, data, generate, export" in capsys.readouterr().err


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 7\nseq_len = 32\n[parallel]\nsp = 4\n[optimizer]\nlr = 0.5\n")
    options = train_command.arguments_of(["--config", str(file), "--steps", "9", "--dp", "2", "--nproc", "8"])
    config = options.settings
    assert (config.steps, config.seq_len, config.parallel.sp, config.parallel.dp) == (9, 32, 4, 2)
    assert config.optimizer.lr == 0.5 and options.nproc == 8
    assert train_command.arguments_of([]).settings == TrainConfig()
    sizes = train_command.arguments_of(["--seq-len", "64K", "--ffn-piece-tokens", "1m"]).settings
    assert (sizes.seq_len, sizes.parallel.ffn_piece_tokens) == (1 << 16, 1 << 20)
    file.write_text('seq_len = "64K"')
    assert train_command.arguments_of(["--config", str(file)]).settings.seq_len == 1 << 16


def test_the_shipped_configs_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    assert files
    for file in files:
        settings = train_command.arguments_of(["--config", str(file)]).settings
        settings.validate((settings.parallel.dp or 1) * settings.parallel.sp)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--sp", "2", "--nproc", "3"], 64, "3 processes cannot be split into sequence groups of 2"),
        (["train", "--sp", "1", "--steps", "5", "--optimizer.warmup-steps", "6"], 64, "at most the 5 steps of"),
        (["train", "--sp", "2", "--seq-len", "7"], 64, "--seq-len must be a multiple of --sp"),
        (["train", "--config", "a.toml", "--resume", "b"], 64, "give one of them"),
        (["train", "--config", "nowhere.toml"], 64, "cannot read the config file nowhere.toml"),
        (["train", "--resume", "nowhere"], 66, "there is no checkpoint in nowhere"),
        (["train", "--resume", "auto"], 64, "name it with --run-dir"),
        (["train", "--sp", "1", "--init-from", "nowhere"], 66, "nowhere is not a folder of `lasp export`"),
        (["verify", "nowhere"], 66, "there is no checkpoint in nowhere"),
        (["export", "nowhere", "--out", "there"], 66, "there is no checkpoint in nowhere"),
        (["generate", "nowhere"], 66, "there is no checkpoint in nowhere"),
        (["generate", "nowhere", "--top-k", "0"], 64, "--top-k must be at least 1"),
        (["train", "--sp", "1", "--data.path", "nowhere"], 65, "nowhere is not a folder"),
        (["train", "--sp", "1", "--model.overrides", "widht", "3"], 64, "no field 'widht'; known: "),
        (
            ["train", "--sp", "2", "--model.overrides", "d_model", "wide"],
            64,
            "d_model must be a whole number, got 'wide'",
        ),
        (["check", "--model.overrides", "negative_eigenvalues", "3"], 64, "must be true or false, got 3"),
        (["plan", "--model.overrides", "layer_pattern", "LX"], 64, "layer_pattern must be of the letters"),
        (
            ["bench", "train", "--sp", "2", "--model.overrides", "backend", "cuda"],
            64,
            "unknown backend 'cuda'; known: auto",
        ),
        (["train", "--stpes", "3"], 64, "--stpes"),
        (["plan", "--gpus"], 64, "--gpus"),
        (["train", "--seed", "9" * 30], 64, "--seed must be a number of at most 64 bits"),
        (["train", "--sample.prompt", "caf\udce9"], 64, "--sample.prompt must be text in UTF-8"),
        (["generate", "nowhere", "--temperature", "nan"], 64, "--temperature must not be negative"),
        (
            ["train", "--sp", "1", "--data.path", "text", "--run-dir", "file"],
            64,
            "--run-dir must be a folder, and file is none",
        ),
        (
            ["train", "--sp", "1", "--data.path", "text", "--run-dir", "file/run"],
            64,
            "--run-dir must be a folder, and file is none",
        ),
        (["train", "--sp", "2", "--data.cache", "file"], 64, "--data.cache must be a folder, and file is none"),
        (["export", "run", "--out", "file/weights"], 66, "there is no checkpoint in run"),
        (["report", "nope"], 64, "nope is not a run folder"),
        (["plan", "--plot", "plan.xyz"], 64, "--plot must end in one of .avif, .eps"),
        (["plan", "--plot", "there.png"], 64, "--plot must name a file, and there.png is a folder"),
        (["bench", "exchange", "--save", "no/where.json"], 64, "--save: the folder of no/where.json does not exist"),
        (["bench", "train", "--output", "/proc/figures.json"], 64, "--output: cannot write /proc/figures.json"),
        (["check", "--device", "cuda"], 64, "--device cuda needs 1 GPU on this machine, found 0"),
    ],
)
def test_wrong_usage_has_a_message_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "there.png").mkdir()
    if "text" in arguments:
        write_text(tmp_path / "text", num_files=3)
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_nproc_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a launcher has started them already"):
        train_command.main(["--nproc", "2"])


def test_train_then_generate_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    small = [f"{key} {value}" for key, value in small_config(tmp_path).model.overrides.items()]
    arguments = "train --sp 1 --data-parallel zero3 --steps 3 --seq-len 32 --data.path text --sample.num-tokens 12"
    assert cli.main([*arguments.split(), "--model.overrides", *" ".join(small).split()]) == 0
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "data")
    said = capsys.readouterr().out
    alone = "all weights in it (--data-parallel zero3 needs several processes"
    for word in (
        alone,
        "30,784 parameters",
        "byte 3-gram",
        "bits per byte",
        str(Path("runs") / run.name / "metrics.jsonl"),
    ):
        assert word in said
    assert (run / "curve.png").exists() and len((run / "sample.txt").read_text()) > 4
    texts = []
    for _ in range(2):
        assert cli.main(["generate", str(run), "--prompt", "abc", "--num-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("abc") and len(texts[0]) > 10


def test_export_is_generated_from_and_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, steps=3)
    trainer.train(config)
    capsys.readouterr()
    out = tmp_path / "exported"
    assert cli.main(["export", str(config.run_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in (*out.iterdir(), config.run_dir / "config.json")}) == 1
    about = export.read(out)
    assert (about["format"], about["model_config"]["mixer"]["kind"]) == (export.FORMAT, "linear-attention")
    # Nothing has to be said again about the model, and what is said wins, to be refused where it does not fit.
    assert train_command.arguments_of(["--init-from", str(out)]).settings.model == config.model
    assert train_command.arguments_of(["--init-from", str(out), "--model.family", "gla"]).settings.model.family == "gla"
    texts = []
    for path in (config.run_dir, out):
        assert cli.main(["generate", str(path), "--prompt", "abc", "--num-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert cli.main(["export", str(config.run_dir), "--out", str(out)]) == 64

    # Weights only: the next run's first loss is that of the exported weights, and its step count starts anew.
    more = dataclasses.replace(config, init_from=out, run_dir=tmp_path / "more", seed=5)
    trainer.train(more)
    fresh = dataclasses.replace(more, init_from=None, run_dir=tmp_path / "fresh")
    trainer.train(fresh)
    losses = [read_metrics(run / "metrics.jsonl")[0]["loss"] for run in (tmp_path / "more", tmp_path / "fresh")]
    assert losses[0] < losses[1] - 0.05
    other = dataclasses.replace(more, run_dir=tmp_path / "other", model=dataclasses.replace(more.model, overrides={}))
    with pytest.raises(CheckpointError, match=r"another model; checkpoint -> now:\n(.*\n)*  d_model: 32 -> 128"):
        trainer.train(other)


def test_no_flipped_bit_of_an_export_is_loaded(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=1)
    trainer.train(config)
    assert config.run_dir is not None
    out = export.export(config.run_dir, tmp_path / "exported", report=pytest.fail)
    source, refused = random.Random(1), 0
    for path in sorted(out.iterdir()):
        good = path.read_bytes()
        for _ in range(50):
            damaged = bytearray(good)
            damaged[source.randrange(len(good))] ^= 1 << source.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                sample.load(out, report=pytest.fail)
            refused += 1
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(CheckpointError):
            sample.load(out, report=pytest.fail)
        path.write_bytes(good)
    assert refused == 100 and sample.load(out, report=pytest.fail).folder == out


def test_one_command_starts_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher runs it again as it is, with nobody to change the command."""
    config = small_config(tmp_path)
    overrides = [f"{key} {value}" for key, value in config.model.overrides.items()]
    fixed = f"train --sp 1 --seq-len 32 --data.path {tmp_path / 'text'} --data.cache {tmp_path / 'cache'}"
    run = tmp_path / "auto"
    words = f"{fixed} --eval-sequences 4 --sample.num-tokens 4 --save-every 2 --run-dir {run} --resume auto".split()
    tail = ["--model.overrides", *" ".join(overrides).split()]
    for steps, begins_after in ((2, None), (4, 2), (4, 4)):
        assert cli.main([*words, "--steps", str(steps), *tail]) == 0
        said = capsys.readouterr().out
        assert ("resumed" in said) == (begins_after is not None)
        assert begins_after is None or f"after step {begins_after}" in said
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    for path in (run / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    assert cli.main([*words, "--steps", "4", *tail]) == 66  # damage is not a reason to start anew
