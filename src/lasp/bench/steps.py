"""Tokens per second, model FLOP utilisation and memory of training steps, on any layout."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import tyro

from lasp import files
from lasp.analysis.devices import DEVICES, peak_flops
from lasp.analysis.flops import flops_per_token
from lasp.analysis.parts import PartCost, part_costs
from lasp.bench.profile import profiled
from lasp.errors import ConfigError, as_config_errors
from lasp.models import CausalLM, ModelConfig
from lasp.parallelize import ParallelModel
from lasp.terminal import counted, say
from lasp.train.config import ModelOptions, OptimizerOptions, ParallelOptions, TrainConfig
from lasp.train.logging.step_timer import peak_memory
from lasp.train.model import spread
from lasp.train.optimizer import build_optimizer, clip
from lasp.train.preflight import check_target
from lasp.train.sizes import Tokens
from lasp.train.world import World, join, leave, naming_lost_peers

# Tokens of a rank: what lengths that nobody asked for are multiples of.
LENGTH_UNIT = 64
# As in the first steps of a long run's warm-up: the model stays as it was initialised. At the peak rate random tokens
# make some gates forget all within steps, for which kernels have other, slower ways.
FIRST_STEPS = OptimizerOptions(lr=2e-6)


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """Time whole training steps (forward, backward, clipping, AdamW) on random tokens, of a model as initialised.

    What is not given is chosen for the device: a model of a billion parameters, 32K tokens and more and bf16 on a GPU;
    a tiny one, some thousand tokens and fp32 on a CPU.

    In a step each of the dp groups trains on one sequence, spread over its sp processes. Alone it starts dp x sp
    processes on this machine; under torchrun it measures those that are there. Utilisation counts the model's own
    operations, see docs/guide/monitoring.md; what is recomputed counts as no work.
    """

    model: ModelOptions = field(default_factory=lambda: ModelOptions(family="transnormer", size="1b"))
    parallel: Annotated[ParallelOptions, tyro.conf.arg(name="")] = field(default_factory=lambda: ParallelOptions(sp=1))
    nproc: int | None = None
    """Processes to start, where no launcher has; default: dp x sp."""
    tokens: tuple[Tokens, ...] = (32768, 65536, 131072, 262144)
    """Lengths of a sequence, over all its processes, one after another."""
    longest: bool = False
    """Go on to the longest sequence that trains: from 0.9 of what the memory of the last two lengths lets expect, by
    1 percent a time, until memory runs out. On a GPU."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast; weights, states and optimizer stay fp32."""
    steps: int = 5
    """Steps that are timed, after one that is not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory_gib: float | None = None
    """Let PyTorch have no more of a GPU's memory than this; default: all. NCCL's buffers are not counted."""
    profile: bool = False
    """Also print what one more step of the first length spent its time on, by part of the model and by kernel."""
    output: Path | None = None
    """JSON file for all figures, written after every length."""

    @property
    def num_processes(self) -> int:
        """Number of processes to start, where no launcher has."""
        return (self.parallel.dp or 1) * self.parallel.sp if self.nproc is None else self.nproc

    def validate(self, *, writes: bool = True) -> None:
        """Raises ConfigError if a value means nothing. writes: this process is the one that writes the file."""
        if not self.tokens or min(self.tokens) < 1 or self.steps < 1 or self.num_processes < 1:
            raise ConfigError(
                f"--tokens, --steps and --nproc must be at least 1, got {self.tokens}, {self.steps}, {self.nproc}"
            )
        if any(tokens % self.parallel.sp for tokens in self.tokens):
            raise ConfigError(f"--tokens must be multiples of --sp {self.parallel.sp}, got {self.tokens}")
        if self.longest and (len(self.tokens) < 2 or self.tokens[-1] <= self.tokens[-2]):
            raise ConfigError(f"--longest goes on from the last two of --tokens, rising, got {self.tokens}")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ConfigError(f"--memory-gib must be above 0, got {self.memory_gib}")
        if writes:
            check_target("--output", self.output)

    def training(self, num_processes: int) -> TrainConfig:
        """The training run whose layout this is. Raises ConfigError if it does not fit the processes."""
        config = TrainConfig(
            model=self.model,
            parallel=self.parallel,
            seq_len=self.tokens[0],
            global_batch=max(1, num_processes // self.parallel.sp),
            precision=self.precision,
            device=self.device,
        )
        config.validate(num_processes)
        return config


def for_device(name: str) -> BenchTrainConfig:
    """The default settings for --device `name`."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return BenchTrainConfig()
    return BenchTrainConfig(
        model=ModelOptions(family="transnormer", size="tiny"), tokens=(512, 1024, 2048, 4096), precision="fp32"
    )


def measure(config: BenchTrainConfig, report: Callable[[str], object] | None = None) -> dict[str, Any]:
    """All lengths, in order, on the processes that are there; the same figures on all.

    report: is told of every length as it is measured, in a line of a table, and on a terminal of every step.

    Of several processes the slowest one's time and the largest memory count. Where one runs out of memory nobody
    knows what the others wait for: the run ends, and the rows so far are in the output.
    Raises ConfigError for a model that does not exist, a layout that does not fit, or a device that is not there, and
    PeerLostError.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    training = config.training(size)
    world = join(training)
    memory_bytes = _limited_memory(config.memory_gib, world.device)
    if config.longest and memory_bytes is None:
        raise ConfigError("--longest needs a GPU: on a CPU nothing says when memory runs out")
    model, model_config = _built(config, training, world)
    step = _step(model, config.precision, world)
    figures = {
        **_conditions(config, model, world),
        "memory_bytes": memory_bytes,
        "rows": [],
        "kernels": None,
        "parts": None,
    }
    tell = report or (lambda _: None)
    tell(heading(figures))
    for tokens in _lengths(config, figures):
        if figures["compile"]:
            torch._dynamo.reset()  # a graph for this length, as training at it has, and not for any
        work = partial(step, _text(tokens, model_config.vocab_size, world))
        try:
            with naming_lost_peers(world), as_config_errors():
                watched = _shown(work, tokens, config.steps + 1) if report is not None and sys.stdout.isatty() else work
                times = _slowest(world, _timed(watched, config.steps, world.device))
        except torch.OutOfMemoryError as error:
            if world.size > 1:
                _end_at_once(f"out of memory on rank {world.rank}, {tokens:,} tokens a sequence: {error}")
            model.module.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            figures["rows"].append({"tokens": tokens, "step_s": None})
        else:
            figures["rows"].append(_row(tokens, times, flops_per_token(model_config, tokens).step, figures))
            if config.profile and figures["kernels"] is None:
                figures |= profiled(work, model.module, world.device)
                _add_floors(figures, model_config, tokens)
        tell(line(figures["rows"][-1]))
        if config.output is not None and world.is_first:
            files.write_output(config.output, json.dumps(figures, indent=1) + "\n")
    if figures["kernels"]:
        tell(kernels(figures))
    leave(world)
    return figures


def _lengths(config: BenchTrainConfig, figures: dict[str, Any]) -> Iterator[int]:
    """Yield the lengths asked for; then, if wanted, longer ones until one does not fit."""
    yield from config.tokens
    if not config.longest or any(row["step_s"] is None for row in figures["rows"]):
        return
    (short, less), (long, more) = ((row["tokens"], row["peak_memory_bytes"]) for row in figures["rows"][-2:])
    expected = long + (figures["memory_bytes"] - more) * (long - short) / max(1.0, more - less)
    unit, tokens = LENGTH_UNIT * figures["sp"], 0.9 * expected
    while figures["rows"][-1]["step_s"] is not None:
        yield max(int(tokens) // unit * unit, figures["rows"][-1]["tokens"] + unit)
        tokens *= 1.01


def _end_at_once(message: str) -> NoReturn:
    """End this process, and by its exit code the run: in an orderly end NCCL may wait for the others for minutes."""
    say(f"lasp: {message}", error=True)
    os._exit(1)


def _conditions(config: BenchTrainConfig, model: ParallelModel, world: World) -> dict[str, Any]:
    """All figures but what is measured."""
    parallel, on_gpu = config.parallel, world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else "CPU"
    return {
        "model": f"{config.model.family}-{config.model.size}",
        "overrides": config.model.overrides,
        "num_parameters": sum(p.numel() for p in model.module.parameters()),
        "precision": config.precision,
        "recomputation": parallel.recomputation,
        "ffn_piece_tokens": parallel.ffn_piece_tokens,
        "compile": parallel.compile,
        "dp": world.shard.dp_size,
        "sp": world.shard.sp_size,
        "data_parallel": parallel.data_parallel,
        "exchange": parallel.exchange,
        "device": name,
        "peak_flops": peak_flops(name, config.precision) if on_gpu else None,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "steps": config.steps,
    }


def _row(tokens: int, times: _Times, flops: float, figures: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of all processes together; utilisation of each GPU."""
    median, peak = statistics.median(times.steps_s), figures["peak_flops"]
    rate = figures["dp"] * tokens / median
    return {
        "tokens": tokens,
        "step_s": median,
        "all_steps_s": times.steps_s,
        "first_step_s": times.first_s,
        "tokens_per_s": rate,
        "flops_per_token": flops,
        "utilisation": None if peak is None else rate * flops / (peak * figures["dp"] * figures["sp"]),
        "peak_memory_bytes": times.peak_bytes,
    }


def _limited_memory(gib: float | None, device: torch.device) -> float | None:
    """Bytes of a GPU that PyTorch can have from now on; None for a CPU."""
    if device.type != "cuda":
        if gib is not None:
            raise ConfigError("--memory-gib limits a GPU's memory, and this runs on the CPU")
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if gib is None else min(1.0, gib * 2**30 / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share * total


def _built(config: BenchTrainConfig, training: TrainConfig, world: World) -> tuple[ParallelModel, ModelConfig]:
    """The model, spread over the processes. Raises ConfigError."""
    model_config = config.model.build()
    with torch.device("meta"):
        module = CausalLM(model_config)
    module.to_empty(device=world.device)
    module.init_weights(torch.Generator(world.device).manual_seed(0))
    return spread(training, module, world), model_config


def _text(tokens: int, vocab_size: int, world: World) -> torch.Tensor:
    """This process's share [1, n + 1] of its group's sequence, the token after it too."""
    random = torch.Generator(world.device).manual_seed(world.shard.dp_rank)
    text = torch.randint(vocab_size, (1, tokens + 1), device=world.device, generator=random)
    share = tokens // world.shard.sp_size
    return text[:, world.shard.sp_rank * share : (world.shard.sp_rank + 1) * share + 1]


def _step(model: ParallelModel, precision: str, world: World) -> Callable[[torch.Tensor], None]:
    """A training step on this process's share of a sequence."""
    optimizer = build_optimizer(model, FIRST_STEPS)

    def step(text: torch.Tensor) -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = model.training(text[:, :-1], labels=text[:, 1:].contiguous(), sp=model.sp)
        model.mean_loss(out.loss_sum, (text.shape[1] - 1) * world.size).backward()
        clip(model, optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _Times(NamedTuple):
    """Seconds of the first step and of each later one, and the most memory held since the first."""

    first_s: float
    steps_s: list[float]
    peak_bytes: float


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> _Times:
    seconds = []
    for number in range(steps + 1):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return _Times(seconds[0], seconds[1:], peak_memory(device))


def _slowest(world: World, times: _Times) -> _Times:
    """The largest of all processes, step by step."""
    rows = world.gather([times.first_s, times.peak_bytes, *times.steps_s])
    first_s, peak_bytes, *steps_s = (max(column) for column in zip(*rows, strict=True))
    return _Times(first_s, steps_s, peak_bytes)


def _shown(step: Callable[[], None], tokens: int, count: int) -> Callable[[], None]:
    """`step`, which says on the terminal which of `count` it is, where the next line takes its place."""
    number = 0

    def shown() -> None:
        nonlocal number
        number += 1
        say(f"{tokens:>9,}   step {number} of {count} ", end="\r")
        step()
        if number == count:
            say(" " * 40, end="\r")

    return shown


def heading(figures: dict[str, Any]) -> str:
    """Lines above the table: the settings, and the names of the columns."""
    ways = [figures["precision"], "compiled" if figures["compile"] else "eager"]
    ways.append(f"recomputation {figures['recomputation']}")
    if figures["dp"] * figures["sp"] > 1:
        ways.append(f"DP x SP = {figures['dp']} x {figures['sp']} ({figures['data_parallel']})")
    if figures["ffn_piece_tokens"]:
        ways.append(f"feed-forward in pieces of {figures['ffn_piece_tokens']}")
    sequences = "one sequence" if figures["dp"] == 1 else f"{figures['dp']} sequences"
    return (
        f"{figures['model']}, {figures['num_parameters']:,} parameters, {', '.join(ways)}; {figures['device']}, "
        f"torch {figures['torch']}; median of {counted(figures['steps'], 'step')} of {sequences}\n"
        f"{'tokens':>9}{'step':>11}{'tokens/s':>12}{'utilisation':>13}{'peak memory':>14}"
    )


def line(row: dict[str, Any]) -> str:
    """One length."""
    if row["step_s"] is None:
        return f"{row['tokens']:>9,}   out of memory"
    share = "-" if row["utilisation"] is None else f"{row['utilisation']:.1%}"
    return (
        f"{row['tokens']:>9,}{row['step_s']:>9.3f} s{row['tokens_per_s']:>12,.0f}{share:>13}"
        f"{row['peak_memory_bytes'] / 2**30:>10.2f} GiB"
    )


def kernels(figures: dict[str, Any]) -> str:
    """Tables of the parts and the kernels that one step spent its time in."""
    total = sum(part["s"] for part in figures["parts"].values())
    lines = [
        "",
        f"one step of {figures['rows'][0]['tokens']:,} tokens, by part; floor: at the device's speeds the least",
    ]
    lines += [f"{'':>7}{'time':>13}{'TFLOP':>9}{'GB':>8}{'floor':>13}{'x floor':>9}"]
    for name, part in figures["parts"].items():
        if part["s"] == 0:
            continue
        flops, nbytes, floor = (part.get(each) for each in ("flops", "bytes", "floor_s"))
        needs = f"{'':>17}" if flops is None else f"{flops / 1e12:>9.3g}{nbytes / 1e9:>8.3g}"
        apart = f"{'':>22}" if floor is None else f"{floor * 1e3:>10.2f} ms{part['s'] / floor:>9.1f}"
        lines.append(f"{part['s'] / total:>7.1%}{part['s'] * 1e3:>10.2f} ms{needs}{apart}  {name}")
    lines += ["", "the kernels that took longest:"]
    lines += [
        f"{row['share']:>7.1%}{row['s'] * 1e3:>10.2f} ms{row['calls']:>7} x  {row['name'][:100]}"
        for row in figures["kernels"]
    ]
    return "\n".join(lines)


def _add_floors(figures: dict[str, Any], config: ModelConfig, tokens: int) -> None:
    """Add to the parts what each must do on this process at least, and where the device is known the time for it."""
    known = next((kind for kind in DEVICES.values() if kind.name.lower() in figures["device"].lower()), None)
    kind = None if known is None else known.training_in(figures["precision"])
    costs = part_costs(config, tokens, figures["precision"])
    for name, cost in costs.items():
        share = 1 if name == "optimizer and clipping" else figures["sp"]
        own = PartCost(cost.flops / share, cost.nbytes / share)
        floor = {} if kind is None else {"floor_s": own.seconds(kind)}
        figures["parts"][name] |= {"flops": own.flops, "bytes": own.nbytes, **floor}
