"""Losses of training compiled, eager and on the torch backend, beside those of other seeds: are they one computation?

    python -m benchmarks.ways --output benchmarks/results          # tiny models in fp32 on a CPU; on a GPU 1b's, bf16
    python -m benchmarks.ways --families mamba2 --size 1b --layers 4 --tokens 2048 --precision bf16

Every run trains on the same text in the same order by `lasp train`'s optimizer. From `eager` differ: `compiled`,
`torch` (recurrences on the torch backend), `moved` (every weight of one matrix moved by one last bit of fp32: no way
can do better where a family amplifies it) and `seed` (other initial weights). Printed are the means over steps of the
losses' differences from eager's. Exit code 1 where a way differs by more than another seed does, or in fp32 by more
than 1e-5 of the loss and than four times what `moved` does: of what a family amplifies that is one draw.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.outputs import folder
from benchmarks.training import new_module, train_on
from lasp.models import NAMES, preset
from lasp.parallelize import parallelize
from lasp.train.config import OptimizerOptions
from lasp.train.optimizer import build_optimizer, learning_rate

# What differs from eager: compiled, the backend, weights moved by a bit, the seed.
WAYS: dict[str, tuple[bool, str, bool, int]] = {
    "eager": (False, "auto", False, 0),
    "compiled": (True, "auto", False, 0),
    "torch": (False, "torch", False, 0),
    "moved": (False, "auto", True, 0),
    "seed": (False, "auto", False, 1),
}
EXACT, DRAWS = 1e-5, 4


def text() -> torch.Tensor:
    """Bytes of Python's asyncio, as token ids."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def losses(family: str, way: str, options: argparse.Namespace) -> list[float]:
    """Losses of the steps of one run, a token."""
    compiled, backend, moved, seed = WAYS[way]
    layers = {} if options.layers is None else {"num_layers": options.layers}
    config = preset(family, options.size, backend=backend, **layers)
    device = torch.device(options.device)
    module = new_module(config, device, torch.Generator("cpu").manual_seed(seed))
    if moved:
        weight = next(p for p in module.blocks.parameters() if p.ndim == 2)
        with torch.no_grad():
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    model = parallelize(module, None, compile=compiled)
    settings = OptimizerOptions()
    optimizer = build_optimizer(model, settings)
    tokens, source = options.tokens, text().to(device)
    found = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, settings)
        start = step * tokens % (len(source) - tokens - 1)
        sequence = source[None, start : start + tokens + 1]
        found.append(train_on(model, optimizer, sequence, bf16=options.precision == "bf16") / tokens)
    return torch.stack(found).tolist()  # type: ignore[no-any-return]


def compared(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """Losses of every way, their mean differences from eager's, and which are too large."""
    runs = {way: losses(family, way, options) for way in options.ways}
    differences = {
        way: statistics.mean(abs(a - b) for a, b in zip(run, runs["eager"], strict=True))
        for way, run in runs.items()
        if way != "eager"
    }
    bound = differences.get("seed", float("inf"))
    if options.precision == "fp32":
        bound = max(EXACT * statistics.mean(runs["eager"]), DRAWS * differences.get("moved", 0.0))
    wrong = [way for way in ("compiled", "torch") if not differences.get(way, 0.0) <= bound]
    return {"family": family, "differences": differences, "wrong": wrong, "losses": runs}


def arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--size", default="1b" if on_gpu else "tiny")
    parser.add_argument("--layers", type=int, default=4 if on_gpu else None)
    parser.add_argument("--tokens", type=int, default=2048 if on_gpu else 128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16" if on_gpu else "fp32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", type=folder)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    conditions = {name: getattr(options, name) for name in ("size", "layers", "tokens", "steps", "precision")}
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, **conditions, "rows": []}
    for family in options.families:
        row = compared(family, options)
        figures["rows"].append(row)
        last = {way: round(run[-1], 4) for way, run in row["losses"].items()}
        shown = {way: f"{difference:.1e}" for way, difference in row["differences"].items()}
        print(json.dumps({"family": family, "differences": shown, "last": last, "wrong": row["wrong"]}), flush=True)
        if options.output is not None:
            path = options.output / f"{datetime.date.today()}-{name.lower().replace(' ', '-')}-ways.json"
            path.write_text(json.dumps(figures) + "\n")
    return int(any(row["wrong"] for row in figures["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
