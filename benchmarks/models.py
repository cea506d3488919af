"""Training steps of every family beside what would be taken instead, in one run on one GPU: tokens/s and peak memory.

    python -m benchmarks.models --output benchmarks/results                   # whole models of 1b
    python -m benchmarks.models --families mamba2 --layers 4 --with-fla DIR   # a few layers; fla's package in DIR
    python -m benchmarks.models --table FILE                                  # a file's rows as a table

`lasp` is this library's model, compiled or not; `fla` and `transformers` are the same model with their layers in the
place of its mixers (benchmarks/baselines/layers.py): the same tokens, norms, feed-forward, loss and optimizer (AdamW,
fp32 weights, bf16 autocast). transnormer, compiled, is the yardstick of a run. Every row has a process of its own,
which is ended after --seconds; one that does not fit is tried at half the tokens, and says so. Rows come one after
another, printed as JSON: beside a library that tunes its kernels, figures were off by half.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.layers import LAYERS, replace_mixers
from benchmarks.outputs import folder
from benchmarks.training import new_module, train_on

FAMILIES = ("transnormer", "mamba2", "gated-deltanet", "gla", "retnet", "deltanet", "kda", "hybrid")
VARIANTS = ("lasp compiled", "lasp eager", *LAYERS)
FEWEST_TOKENS = 512
ROOT = Path(__file__).parent.parent


def steps(family: str, variant: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: medians of --steps steps on random tokens, after one that is not timed."""
    from lasp.models import preset
    from lasp.parallelize import parallelize
    from lasp.train.config import OptimizerOptions
    from lasp.train.optimizer import build_optimizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = {} if options.layers is None else {"num_layers": options.layers}
    config = preset(family, options.size, **layers)
    module = new_module(config, device, torch.Generator(device).manual_seed(0))
    if variant in LAYERS:
        replace_mixers(module, family, variant)
    model = parallelize(module, None, compile=variant == "lasp compiled")
    optimizer = build_optimizer(model, OptimizerOptions(lr=2e-6))  # the model stays as it was initialised
    random = torch.Generator(device).manual_seed(0)
    text = torch.randint(config.vocab_size, (1, tokens + 1), device=device, generator=random)
    seconds = []
    for number in range(options.steps + 1):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train_on(model, optimizer, text, bf16=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    row = {"tokens": tokens, "layers": config.num_layers, "step_s": step, "tokens_per_s": tokens / step}
    return row | {"first_step_s": seconds[0], "peak_memory_bytes": peak}


def one(options: argparse.Namespace) -> None:
    """Print the row of this process."""
    family, variant = options.one
    tokens = options.tokens
    row: dict[str, Any] = {"family": family, "variant": variant}
    while True:
        try:
            row |= steps(family, variant, tokens, options)
        except torch.OutOfMemoryError:
            tokens //= 2
            row["does_not_fit"] = 2 * tokens
            if tokens < FEWEST_TOKENS:
                break
            torch.cuda.empty_cache()
            continue
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        break
    print(json.dumps(row), flush=True)


def measured(options: argparse.Namespace, family_variant: tuple[str, str]) -> dict[str, Any]:
    """The row of a process of its own."""
    family, variant = family_variant
    command = [sys.executable, "-m", "benchmarks.models", "--one", family, variant, "--tokens", str(options.tokens)]
    command += ["--size", options.size, "--steps", str(options.steps)]
    command += [] if options.layers is None else ["--layers", str(options.layers)]
    paths = [str(path) for path in (options.with_fla if variant == "fla" else None,) if path is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    row: dict[str, Any] = {"family": family, "variant": variant}
    try:
        found = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=options.seconds
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"no {options.steps + 1} steps within {options.seconds:.0f} s"}
    lines = [line for line in found.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else row | {"error": found.stderr.strip()[-300:]}  # type: ignore[no-any-return]


def table(figures: dict[str, Any]) -> str:
    """Rows of a file, as Markdown."""
    lines = ["| model | | layers | tokens | tokens/s | peak GiB |", "|---|---|---|---|---|---|"]
    for row in figures["rows"]:
        cells = [row["family"], row["variant"], str(row.get("layers", "")), f"{row.get('tokens', 0):,}"]
        if "step_s" in row:
            peak = row["peak_memory_bytes"]
            cells += [f"{row['tokens_per_s']:,.0f}", "" if peak is None else f"{peak / 2**30:.1f}"]
        else:
            cells += [row.get("error", "does not fit").split("\n")[0][:80], ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each row")
    parser.add_argument("--with-fla", type=Path, help="folder with flash-linear-attention")
    parser.add_argument("--output", type=folder)
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())))
        return
    if options.one is not None:
        one(options)
        return
    wanted = [
        (family, variant)
        for family in options.families
        for variant in options.variants
        if variant not in LAYERS or family in LAYERS[variant][1]
    ]
    on_gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "size": options.size,
        "steps": options.steps,
        "rows": [],
    }
    for family_variant in wanted:
        row = measured(options, family_variant)
        print(json.dumps(row), flush=True)
        figures["rows"].append(row)
        if options.output is not None:
            name = f"{datetime.date.today()}-{figures['device'].lower().replace(' ', '-')}-models.json"
            (options.output / name).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
