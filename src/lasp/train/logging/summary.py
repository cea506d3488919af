"""The tables that a run prints before its first step and after its last."""

from pathlib import Path

from lasp.data.store import TokenStore
from lasp.parallelize import ParallelModel
from lasp.terminal import counted
from lasp.train.checkpoint import Checkpoint
from lasp.train.config import TrainConfig
from lasp.train.evaluate import Score
from lasp.train.logging.output import bytes_text, duration
from lasp.train.logging.program import lasp_command
from lasp.train.world import World


def introduction(
    config: TrainConfig,
    world: World,
    model: ParallelModel,
    store: TokenStore,
    run_dir: Path,
    *,
    finished: int,
    step_seconds: float,
    resumed: Checkpoint | None,
) -> dict[str, str]:
    """Rows printed before the first step. finished: steps made before. step_seconds: of one step."""
    optimizer, tokens = config.optimizer, config.global_batch * config.seq_len
    source = config.data.path or "the Python standard library of this machine"
    tokenizer = config.data.tokenizer or store.tokenizer
    if config.init_from is not None and resumed is None:
        tokenizer += f", that of {config.init_from}"
    num_parameters = sum(parameter.numel() for parameter in model.module.parameters())
    left = config.steps - finished
    rows = {
        "model": f"{num_parameters:,} parameters, {config.precision}",
        "text": f"{source}: {bytes_text(store.num_bytes['train'])} in "
        f"{counted(store.num_documents['train'], 'document')} to train on, "
        f"{bytes_text(store.num_bytes['validation'])} in {store.num_documents['validation']:,} held out; "
        f"tokenizer {tokenizer}",
        "documents": store.reading.summary(),
        "layout": layout(config, world, model),
        "work": f"{counted(left, 'step')} of {config.global_batch} x {config.seq_len} = {tokens:,} tokens, about "
        f"{duration(left * step_seconds)}"
        if left > 0
        else f"nothing is left: {counted(config.steps, 'step')} finished",
        "schedule": f"{counted(optimizer.warmup_steps or 0, 'step')} of warm-up, then cosine until step "
        f"{optimizer.schedule_steps}",
        "run folder": str(run_dir),
    }
    if resumed is not None:
        rows["resumed"] = f"{resumed.folder}, after step {finished}"
    return rows


def layout(config: TrainConfig, world: World, model: ParallelModel) -> str:
    """The processes and what each has of weights and tokens, in words."""
    parallel, shard = config.parallel, world.shard
    text = f"{counted(world.size, 'process', 'processes')} on {world.device.type}: "
    text += f"dp {shard.dp_size} x sp {shard.sp_size}, "
    text += model.data_parallel if world.size > 1 else "all weights in it"
    if world.size == 1 and parallel.data_parallel != "ddp":
        text += f" (--data-parallel {parallel.data_parallel} needs several processes: start more)"
    if parallel.dp_replicate > 1:
        text += f" in {parallel.dp_replicate} copies"
    if model.sp is not None:
        text += f", {config.seq_len // shard.sp_size} of {config.seq_len} tokens each, "
        text += f"states by {model.sp.exchange.name}"
    return text


def scores(score: Score, trigram: float | None) -> dict[str, str]:
    """The model's score, and the byte 3-gram model's beside it."""
    rows = {"validation": f"{score.bits_per_byte:.4f} bits per byte on {score.num_tokens:,} tokens"}
    if trigram is not None:
        better = 1 - score.bits_per_byte / trigram
        rows["byte 3-gram"] = f"{trigram:.4f} bits per byte on the same tokens; the model needs " + (
            f"{better:.1%} fewer" if better >= 0 else f"{-better:.1%} more"
        )
    return rows


def whereabouts(
    config: TrainConfig, run_dir: Path, *, finished: int, seconds: float, prompt: str, curve: str
) -> dict[str, str]:
    """Rows printed at the end: files, and commands to go on with. curve: its picture, or why there is none."""
    rows = {
        "time": f"{duration(seconds)} for {finished} of {config.steps} steps and start-up",
        "run folder": str(run_dir),
        "checkpoint": str(run_dir / "checkpoints" / f"step-{finished:08d}"),
        "metrics": str(run_dir / "metrics.jsonl"),
        "report": lasp_command("report", run_dir),
        "loss curve": curve,
        "more text": lasp_command("generate", run_dir, "--prompt", prompt),
    }
    if finished < config.steps:
        rows["continue"] = lasp_command("train", "--resume", run_dir)
    return rows
