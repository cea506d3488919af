"""`lasp bench train`: tokens per second, model FLOP utilisation and memory of training steps on one device."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from lasp.train.config import ModelOptions, OptimizerOptions
from lasp.train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """Time whole training steps (forward, backward, clipping, AdamW) on random tokens, one sequence a step.

    Utilisation counts the model's own operations, see docs/training.md; what is recomputed counts as no work.
    """

    model: ModelOptions = field(default_factory=lambda: ModelOptions(family="transnormer", size="1b"))
    tokens: tuple[int, ...] = (32768, 65536, 131072, 262144)
    """Lengths of the sequence, one after another."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast; weights, states and optimizer stay fp32."""
    recomputation: Literal["none", "selective", "full"] = "none"
    """On one device, where nothing is exchanged, selective is full."""
    ffn_piece_tokens: int | None = None
    """Run feed-forward layers on so many tokens at a time."""
    compile: bool = False
    """torch.compile each block."""
    steps: int = 5
    """Steps that are timed, after one that is not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    profile: bool = False
    """Also print what one more step of the first length spent its time on, kernel by kernel."""
    output: Path | None = None
    """JSON file for all figures."""

    def validate(self) -> None:
        """Raises ConfigError if a value means nothing."""
        if not self.tokens or min(self.tokens) < 1 or self.steps < 1:
            raise ConfigError(f"--tokens and --steps must be at least 1, got {self.tokens} and {self.steps}")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise ConfigError(f"the folder of {self.output} does not exist")


def main(arguments: Sequence[str]) -> int:
    """Run `lasp bench train ARGUMENTS`."""
    config = tyro.cli(BenchTrainConfig, args=list(arguments), prog="lasp bench train")
    config.validate()
    figures = measure(config)
    print(table(figures))
    if config.output is not None:
        config.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if any(row["step_s"] is not None for row in figures["rows"]) else 1


def measure(config: BenchTrainConfig) -> dict[str, Any]:
    """All lengths, in order. Raises ConfigError for a model that does not exist or a device that is not there."""
    import torch

    from lasp.analysis.devices import peak_flops
    from lasp.analysis.flops import flops_per_token
    from lasp.models import CausalLM, preset
    from lasp.parallelize import parallelize
    from lasp.train.optimizer import build_optimizer

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but PyTorch finds no GPU here")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        model_config = preset(config.model.family, config.model.size, **config.model.overrides)
        with torch.device("meta"):
            module = CausalLM(model_config)
        module.to_empty(device=device)
        module.init_weights(torch.Generator(device).manual_seed(0))
        model = parallelize(
            module,
            None,
            recomputation=config.recomputation,
            ffn_piece_tokens=config.ffn_piece_tokens,
            compile=config.compile,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    optimizer = build_optimizer(model, OptimizerOptions())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, config.precision) if device.type == "cuda" else None

    def step(text: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            out = model.training(text[:, :-1], labels=text[:, 1:].contiguous())
        model.mean_loss(out.loss_sum, text.shape[1] - 1).backward()
        model.clip_gradients(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rows: list[dict[str, Any]] = []
    kernels = None
    for tokens in config.tokens:
        text = torch.randint(model_config.vocab_size, (1, tokens + 1), device=device)
        flops = flops_per_token(model_config, tokens).step
        try:
            first_s, seconds, memory = _timed(lambda text=text: step(text), config.steps, device)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            rows.append({"tokens": tokens, "step_s": None})
            continue
        rate = tokens / statistics.median(seconds)
        rows.append(
            {
                "tokens": tokens,
                "step_s": statistics.median(seconds),
                "all_steps_s": seconds,
                "first_step_s": first_s,
                "tokens_per_s": rate,
                "flops_per_token": flops,
                "utilisation": None if peak is None else rate * flops / peak,
                "peak_memory_bytes": memory,
            }
        )
        if config.profile and kernels is None:
            kernels = _kernels(lambda text=text: step(text), device)  # type: ignore[misc]
    return {
        "model": f"{config.model.family}-{config.model.size}",
        "overrides": config.model.overrides,
        "num_parameters": sum(p.numel() for p in module.parameters()),
        "precision": config.precision,
        "recomputation": config.recomputation,
        "ffn_piece_tokens": config.ffn_piece_tokens,
        "compile": config.compile,
        "device": name,
        "peak_flops": peak,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "steps": config.steps,
        "rows": rows,
        "kernels": kernels,
    }


def _timed(step: Callable[[], None], steps: int, device: Any) -> tuple[float, list[float], float]:
    """Seconds of the first step and of each of `steps` more, and the most memory held since the first."""
    import torch

    from lasp.train.watch import peak_memory

    seconds = []
    for number in range(steps + 1):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1:], peak_memory(device)


def _kernels(step: Callable[[], None], device: Any, count: int = 25) -> list[dict[str, Any]]:
    """The kernels (on a CPU, the operators) that a step spends most of its own time in."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        step()
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "s": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6,
        }
        for event in profiled.key_averages()
        # On a GPU, of kernels alone: the operators that launch them are listed too, with the same time.
        if not on_gpu or str(event.device_type).endswith("CUDA")
    ]
    rows.sort(key=lambda row: -row["s"])
    total = sum(row["s"] for row in rows)
    return [{**row, "share": row["s"] / total} for row in rows[:count]]


def table(figures: dict[str, Any]) -> str:
    """What is printed."""
    ways = [figures["precision"], "compiled" if figures["compile"] else "eager"]
    ways.append(f"recomputation {figures['recomputation']}")
    if figures["ffn_piece_tokens"]:
        ways.append(f"feed-forward in pieces of {figures['ffn_piece_tokens']}")
    lines = [
        f"{figures['model']}, {figures['num_parameters']:,} parameters, {', '.join(ways)}; {figures['device']}, "
        f"torch {figures['torch']}; median of {figures['steps']} steps of one sequence",
        f"{'tokens':>9}{'step':>11}{'tokens/s':>12}{'utilisation':>13}{'peak memory':>14}",
    ]
    for row in figures["rows"]:
        if row["step_s"] is None:
            lines.append(f"{row['tokens']:>9,}   out of memory")
            continue
        share = "-" if row["utilisation"] is None else f"{row['utilisation']:.1%}"
        lines.append(
            f"{row['tokens']:>9,}{row['step_s']:>9.3f} s{row['tokens_per_s']:>12,.0f}{share:>13}"
            f"{row['peak_memory_bytes'] / 2**30:>10.2f} GiB"
        )
    if figures["kernels"]:
        lines += ["", f"one step of {figures['rows'][0]['tokens']:,} tokens, the kernels that took longest:"]
        lines += [
            f"{row['share']:>7.1%}{row['s'] * 1e3:>10.2f} ms{row['calls']:>7} x  {row['name'][:100]}"
            for row in figures["kernels"]
        ]
    return "\n".join(lines)
