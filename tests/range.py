"""The range of versions that is claimed, tried: `python -m tests.range` (`make range`).

Each combination of Python, PyTorch and Triton gets an environment of its own, in which the core of the tests runs; then
the environment is removed, unless `--keep` leaves it for the next run: PyTorch for CUDA, as the index has it for Linux,
takes 5 GB and minutes. What cannot be had is listed as not run, with why. A table ends it; the exit code is 1 if a
combination that ran failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# The least and the usual PyTorch, with the Triton that each was released with; None is the newest that pip finds.
OLDEST, USUAL = ("2.11.0", "3.6.0"), ("2.13.0", "3.7.1")
# Triton 3.6's interpreter, in which kernels run here, takes arrays of one value for numbers: NumPy 2.4 refuses that.
OTHERS = {"3.6.0": ["numpy<2.4"]}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CORE = ("laws", "ops", "exchange", "distributed", "kernels", "layers", "models", "generate", "train")
DEADLINE_S = 3600
NEEDED_BYTES = 12 << 30  # the environment, and the archives that pip unpacks into it


class Versions(NamedTuple):
    """One combination. None: the newest."""

    python: str
    torch: str | None
    triton: str | None

    def __str__(self) -> str:
        return f"Python {self.python}, PyTorch {self.torch or 'newest'}, Triton {self.triton or 'newest'}"


class Outcome(NamedTuple):
    """What came of it: "passed", "failed" or "not run", and the details."""

    verdict: str
    details: str


def combinations() -> list[Versions]:
    """This Python with the oldest, the usual and the newest; every other Python with the usual."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    others = [Versions(python, *USUAL) for python in PYTHONS if python != here]
    return [Versions(here, *OLDEST), Versions(here, *USUAL), Versions(here, None, None), *others]


def interpreter(version: str) -> str | None:
    """A Python of that version which starts, if there is one: on the PATH, or one of pyenv's."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(name), *map(str, sorted(pyenv.glob(f"{version}.*/bin/{name}"), reverse=True))]
    for path in filter(None, found):
        if subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return path
    return None


def run(versions: Versions, tests: list[str], keep: bool) -> Outcome:
    """Install and test one combination, and remove its environment unless it is to be kept."""
    python = interpreter(versions.python)
    if python is None:
        return Outcome("not run", f"there is no Python {versions.python}")
    name = re.sub(r"[^a-z0-9.]+", "-", str(versions).lower())
    folder = scratch() / name
    if not folder.exists() and shutil.disk_usage(scratch()).free < NEEDED_BYTES:
        return Outcome("not run", f"{scratch()} has less than {NEEDED_BYTES >> 30} GiB free")
    try:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(folder / "bin" / "python")
        for wanted in wanted_packages(versions):
            done = said([inside, "-m", "pip", "install", "--quiet", "--no-cache-dir", *wanted])
            if done.returncode:
                return Outcome("not run", f"pip install {' '.join(wanted)}: {last_line(done.stdout)}")
        done = said([inside, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "-p", "no:cacheprovider", *tests])
        found = dict(line.split()[:2] for line in said([inside, "-m", "lasp", "--version"]).stdout.splitlines())
        told = "; ".join(
            [*(f"{part} {found.get(part)}" for part in ("Python", "torch", "triton")), last_line(done.stdout)]
        )
        log = scratch() / f"{name}.log"
        log.write_text(done.stdout)
        if done.returncode:
            told += f"; all of it: {log.relative_to(ROOT)}"
        return Outcome("failed" if done.returncode else "passed", told)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def wanted_packages(versions: Versions) -> Iterator[list[str]]:
    """What pip installs, one call after another: PyTorch first, since it may ask for a Triton of its own."""
    yield [f"torch=={versions.torch}" if versions.torch else "torch"]
    yield ["--no-deps", f"triton=={versions.triton}" if versions.triton else "triton"]
    yield ["-e", f"{ROOT}[report,dev]", *OTHERS.get(versions.triton or "", [])]


def scratch() -> Path:
    """Where environments are made."""
    folder = ROOT / "build" / "range"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def said(command: list[str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=clean,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, f"did not end within {DEADLINE_S} s")


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the combinations, those whose name has this pattern")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/range, for the next run")
    parser.add_argument("tests", nargs="*", default=[f"tests/{name}" for name in CORE], help="what pytest runs")
    options = parser.parse_args()
    outcomes = {}
    for versions in combinations():
        if re.search(options.only, str(versions)):
            outcomes[versions] = run(versions, options.tests, options.keep)
        else:
            outcomes[versions] = Outcome("not run", "left out with --only")
        print(f"{versions}: {outcomes[versions].verdict}: {outcomes[versions].details}", flush=True)
    print("\n| Python | PyTorch | Triton | outcome | what pytest said, with what was installed, or why not run |")
    print("|---|---|---|---|---|")
    for versions, outcome in outcomes.items():
        print("|", " | ".join([*(name or "newest" for name in versions), *outcome]), "|")
    return int(any(outcome.verdict == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
