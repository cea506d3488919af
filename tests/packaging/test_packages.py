"""The package as users get it: built, installed into environments of its own, run outside the checkout.

The wheel goes into an empty environment and brings what it needs. The source archive and every extra go into others
that see its packages and nothing else. Minutes, and packages from the network: `make packages`.
"""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch
from tokenizer_files import byte_level
from training_runs import write_text

import lasp

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[2]
TORCH = f"torch=={torch.__version__.split('+')[0]}"
SMALL = "--model.overrides d_model 32 num_layers 2 num_heads 2 key_dim 16 value_dim 16 ffn_dim 64"
TRAIN = f"lasp train --sp 2 --data.path text --steps 10 --seq-len 64 --eval-sequences 4 --sample.num-tokens 4 {SMALL}"


class Environment:
    """A virtual environment, and commands in it."""

    def __init__(self, folder: Path, *, below: Environment | None = None) -> None:
        """below: one whose packages this one sees too."""
        venv.create(folder, with_pip=True, symlinks=True)
        self.bin = folder / "bin"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        if below is not None:
            (self.packages / "below.pth").write_text(f"{below.packages}\n")

    def install(self, *wanted: str) -> None:
        self.run(f"{self.bin}/python -m pip install --quiet --disable-pip-version-check {' '.join(wanted)}", Path("/"))

    def run(self, command: str, folder: Path, *, code: int = 0, **variables: str) -> str:
        """Run a shell command in a folder; what it printed. Raises AssertionError if it ends with another exit code."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=folder,
            env=clean | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source archive, built from what git knows of."""
    folder = tmp_path_factory.mktemp("archives")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src", "*.toml", "*.md", "LICENSE"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in names:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    script = "from setuptools import build_meta as made; made.build_sdist('..'); made.build_wheel('..')"
    tools = Environment(folder / "tools")
    tools.install("'setuptools>=77'", "wheel")
    tools.run(f'python -c "{script}"', source)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "archive": archive}


@pytest.fixture(scope="module")
def base(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An empty environment into which the wheel was installed."""
    environment = Environment(tmp_path_factory.mktemp("base"))
    environment.install(TORCH, str(archives["wheel"]))
    return environment


def check_trains(environment: Environment, folder: Path) -> None:
    write_text(folder / "text", num_files=6)
    for command in ("lasp", "python -m lasp"):
        said = environment.run(f"{command} --version", folder)
        assert f"lasp {lasp.__version__}\n" in said and f"torch {torch.__version__.split('+')[0]}" in said
    where = environment.run("python -c 'import lasp; print(lasp.__file__)'", folder)
    assert Path(where.strip()).is_relative_to(environment.packages)
    environment.run(f"{TRAIN} --run-dir runs/first", folder)
    environment.run("lasp report runs/first && lasp generate runs/first --num-tokens 4", folder)
    assert (folder / "runs" / "first" / "report.html").stat().st_size > 10_000


def test_the_wheel_trains_in_an_empty_environment(base: Environment, tmp_path: Path) -> None:
    check_trains(base, tmp_path)
    assert base.run("python -m pip check", tmp_path) == "No broken requirements found.\n"


def test_the_source_archive_trains(base: Environment, archives: dict[str, Path], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment", below=base)
    environment.install("--no-deps", "--force-reinstall", str(archives["archive"]))
    (tmp_path / "work").mkdir()
    check_trains(environment, tmp_path / "work")


_X = "import torch, lasp; x = torch.ones(1, 20, 1, 16)"
_TRITON = f"python -c '{_X}; lasp.linear_attention(x, x, x, backend=\"triton\")'"
_FLA = "python -c 'from lasp.kernels.fla.library import kernels; kernels()'"
_PARQUET = "lasp data build rows.parquet --out built"
# What each extra is for; what is said without it, and with which exit code.
EXTRAS = {
    "triton": (_TRITON, 1, "triton"),
    "fla": (_FLA, 1, "fla-core==0.6.0"),
    "report": ("lasp plan --gpus 2 --plot plan.png", 64, "matplotlib is not installed"),
    "hf": ("lasp data build text --tokenizer words.json --out built", 64, "tokenizers"),
    "parquet": (_PARQUET, 64, "pyarrow"),
    "track": (f"{TRAIN} --track tensorboard wandb", 64, "track"),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_enough_alone(extra: str, base: Environment, archives: dict[str, Path], tmp_path: Path) -> None:
    command, code, message = EXTRAS[extra]
    write_text(tmp_path / "text", num_files=6)
    byte_level(tmp_path / "words.json")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    variables = {"TRITON_INTERPRET": "1", "WANDB_MODE": "offline"}
    assert message in base.run(command, tmp_path, code=code, **variables)
    environment = Environment(tmp_path / "environment", below=base)
    environment.install("--no-deps", "--ignore-installed", str(archives["wheel"]))
    environment.install(f"'lasp-torch[{extra}] @ file://{archives['wheel']}'", TORCH)
    if extra == "parquet":
        rows = "pyarrow.table({'text': ['a word'] * 99})"
        write = f"import pyarrow.parquet; pyarrow.parquet.write_table({rows}, 'rows.parquet')"
        environment.run(f'python -c "{write}"', tmp_path)
    environment.run(command, tmp_path, **variables)
