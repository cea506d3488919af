"""Models of transformers on a GPU, as they come and with this library's kernels: tokens/s, memory, longest sequence.

    python benchmarks/transformers_models.py --output benchmarks/results            # with --with-fla DIR, fla's too
    python benchmarks/transformers_models.py --tiny                                 # the script itself, on a CPU

`transformers` is the model as it comes, `lasp` is `lasp.hf.parallelize(model, None)`, and `+fla` either with the
flash-linear-attention of --with-fla. Weights are random, in bf16, layers are recomputed in backward. A step is forward,
backward and a step of SGD, on one sequence; sequences double until a step does not fit, and then grow by half, or until
one takes longer than --step-seconds. `two` compares two processes over gloo on one GPU with one: loss, logits and
gradients of a model of four layers, and, as the control, a rank's tokens by themselves.

Every variant has a process of its own, on a GPU of its own where there are several, and a share of --seconds after
which it is ended. Each line is printed as soon as it is measured. In the end there is a line for each variant: its
longest sequence, what ended it, and how many tokens would fit by the memory of the two longest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

VOCABULARY = 32768
QWEN3_NEXT: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 2048, "num_experts": 0,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 6,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64, "state_size": 128, "n_groups": 1,
    "chunk_size": 256,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {"qwen3_next": ("Qwen3Next", QWEN3_NEXT), "mamba2": ("Mamba2", MAMBA2)}
# With shares of the time: fla chooses its kernels' configurations by trying them. For mamba2 transformers calls none.
VARIANTS: dict[str, dict[str, float]] = {
    "qwen3_next": {"transformers+fla": 2.0, "lasp": 1.0, "transformers": 1.0, "two": 1.0, "lasp+fla": 0.7},
    "mamba2": {"lasp": 1.0, "transformers": 1.0, "two": 1.0},
}
SHORTEST = 512
# At this width weights of the usual size have outputs that hardly depend on other tokens.
TINY: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "initializer_range": 0.2, "hidden_size": 32, "num_hidden_layers": 4,
        "layer_types": QWEN3_NEXT["layer_types"][:4], "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "mamba2": {
        "initializer_range": 0.2, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
        "state_size": 8, "chunk_size": 16,
    },
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS["qwen3_next"], default=list(VARIANTS["qwen3_next"]))
    parser.add_argument("--with-fla", type=Path, help="folder with flash-linear-attention")
    parser.add_argument("--first", type=int, default=4096, help="tokens of the shortest sequence")
    parser.add_argument("--longest", type=int, default=1 << 20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--step-seconds", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=430.0, help="of all variants together")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # model, variant, seconds
    return parser.parse_args()


def build(
    args: argparse.Namespace, kind: str, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> Any:
    """A model with random weights, and decays slow enough for far tokens to count."""
    import transformers

    transformers.logging.set_verbosity_error()
    name, settings = MODELS[kind]
    settings = settings | (TINY[kind] if args.tiny else {}) | {"vocab_size": 96 if args.tiny else VOCABULARY}
    if layers is not None:
        settings |= {"num_hidden_layers": layers}
        settings |= {"layer_types": settings["layer_types"][:layers]} if "layer_types" in settings else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(tie_word_embeddings=True, use_cache=False, **settings)
    with device:
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.copy_(torch.linspace(-4, -2, parameter.numel()).view_as(parameter))
    return model.to(dtype).train()


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if args.tiny else "cuda")


def batch_of(model: Any, tokens: int) -> dict[str, Any]:
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def measure(args: argparse.Namespace, kind: str, variant: str, end: float) -> Iterator[dict[str, Any]]:
    """A record for every length."""
    import lasp
    import lasp.hf

    device = device_of(args)
    model = build(args, kind, device, torch.float32 if args.tiny else torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(parameter.numel() for parameter in model.parameters())
    is_ours = variant.startswith("lasp")
    if is_ours:
        lasp.hf.parallelize(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens, fits, grew_by_half = args.first, 0, False
    while min(SHORTEST, args.first) <= tokens <= args.longest:
        batch = batch_of(model, tokens)
        found = steps(args, model, optimizer, lasp.hf.shard(batch, None) if is_ours else batch)
        yield {"model": kind, "variant": variant, "weights": weights, "tokens": tokens, **found}
        # Twice, for the first compiles; and attention makes the next four times as long.
        if grew_by_half or time.monotonic() + 2 * 4 * found.get("step_s", 0.0) > end:
            return
        if "out_of_memory" in found:
            grew_by_half = fits > 0
            tokens = fits * 3 // 2 if fits else tokens // 2
        elif found["step_s"] > args.step_seconds:
            return
        else:
            fits, tokens = tokens, 2 * tokens
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def steps(args: argparse.Namespace, model: Any, optimizer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Times of a step, and its memory."""
    on_gpu, seconds = batch["input_ids"].is_cuda, list[float]()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(1 + args.repeat):  # the first compiles
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if sum(seconds[1:]) > args.step_seconds:
                break
    except RuntimeError as error:  # of PyTorch, of cuBLAS or of a launch
        if "out of memory" not in str(error) and "ALLOC_FAILED" not in str(error):
            raise
        return {"out_of_memory": True}
    best = statistics.median(seconds[1:] or seconds)
    return {
        "loss": loss.item(), "step_s": best, "tokens_per_s": batch["input_ids"].numel() / best,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "spread": (max(seconds[1:]) - min(seconds[1:])) / best if seconds[1:] else None,
    }  # fmt: skip


def two(args: argparse.Namespace, kind: str) -> Iterator[dict[str, Any]]:
    """Two processes against one, in fp32 and bf16: relative errors, the largest over ranks.

    `alone`: how far the logits of a rank's tokens are off that sees no others.
    """
    import processes

    for dtype in (torch.float32, torch.bfloat16):
        found = processes.run(2, lambda rank, dtype=dtype: two_as_rank(args, kind, dtype))
        yield {
            "model": kind, "variant": "two", "dtype": str(dtype)[6:],
            **{name: max(row[name] for row in found) for name in found[0]},
        }  # fmt: skip


def two_as_rank(args: argparse.Namespace, kind: str, dtype: torch.dtype) -> dict[str, float]:
    import torch.distributed as dist

    import lasp
    import lasp.hf

    torch.backends.cuda.matmul.allow_tf32 = False
    sp = lasp.SequenceParallel(dist.group.WORLD)
    tokens = 61 if args.tiny else 1000  # transformers' own mamba2 takes gigabytes for so many
    lengths = (tokens // 3, tokens - tokens // 3)
    here = slice(sum(lengths[: sp.rank]), sum(lengths[: sp.rank + 1]))

    def measured(sp: Any, tokens_of: slice = slice(None), *, split: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        model = build(args, kind, device_of(args), dtype, 4)
        batch = {name: value[:, tokens_of] for name, value in batch_of(model, tokens).items()}
        if split:
            lasp.hf.parallelize(model, sp)
            batch = lasp.hf.shard(batch, sp, None if sp is None else lengths)
        output = model(**batch)
        output.loss.backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        return output.loss.detach(), output.logits.detach(), gradients

    loss, logits, gradients = measured(sp)
    gradients = {name: sp.sum(gradient) / 2 for name, gradient in gradients.items()}
    found: dict[str, float] = {}
    for against, split in (("lasp", True), ("transformers", False)):
        whole = measured(None, split=split)
        found |= {
            f"loss_to_{against}": error(loss, whole[0]),
            f"logits_to_{against}": error(logits, whole[1][:, here]),
            f"gradients_to_{against}": error(flat(gradients), flat(whole[2])),
        }
    return found | {"alone": error(measured(None, here)[1], whole[1][:, here])}


def flat(gradients: dict[str, Any]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def as_one(args: argparse.Namespace) -> None:
    """Measure a variant in this process."""
    kind, variant, seconds = args.one
    end = time.monotonic() + float(seconds)
    for record in two(args, kind) if variant == "two" else measure(args, kind, variant, end):
        print(json.dumps(record), flush=True)


class Runs:
    """Measures variants, each in a process on one of the GPUs, until the time is over; keeps what they print."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end = args, time.monotonic() + args.seconds
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = given.split(",") if given else [str(gpu) for gpu in range(torch.cuda.device_count() or 2)]
        self.free: SimpleQueue[str] = SimpleQueue()
        for device in self.devices:
            self.free.put(device)
        self.lines: list[str] = []
        self.lock = threading.Lock()
        self.waiting = {
            (kind, variant): share
            for kind in args.models
            for variant, share in VARIANTS[kind].items()
            if variant in args.variants and (args.with_fla or not variant.endswith("+fla"))
        }

    def say(self, record: dict[str, Any]) -> None:
        with self.lock:
            self.lines.append(json.dumps(record))
            print(self.lines[-1], flush=True)

    def all(self) -> None:
        with ThreadPoolExecutor(len(self.devices)) as pool:
            list(pool.map(lambda job: self.one(*job), list(self.waiting)))

    def one(self, kind: str, variant: str) -> None:
        device = self.free.get()
        with self.lock:
            left = max(self.end - time.monotonic(), 1.0)
            all_shares = sum(self.waiting.values())
            seconds = min(left, left * len(self.devices) * self.waiting.pop((kind, variant)) / all_shares)
        path = [str(self.args.with_fla)] if variant.endswith("+fla") else []
        path = [part for part in (*path, os.environ.get("PYTHONPATH")) if part]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": device}
        again = [sys.executable, *sys.argv, "--one", kind, variant, str(seconds)]
        found, ended = [], "time"
        with tempfile.TemporaryFile("w+") as errors:
            ran = subprocess.Popen(
                again, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            # Of its processes too.
            alarm = threading.Timer(seconds, lambda: os.killpg(ran.pid, signal.SIGKILL))
            alarm.start()
            assert ran.stdout is not None
            for line in ran.stdout:
                found.append(json.loads(line))
                self.say(found[-1])
            code = ran.wait()
            alarm.cancel()
            if code == -signal.SIGKILL:
                self.say({"model": kind, "variant": variant, "ended_after_s": round(seconds)})
            elif code != 0:
                ended = "failure"
                errors.seek(0)
                self.say({"model": kind, "variant": variant, "failed": errors.read()[-2000:]})
        if variant != "two":
            self.say(longest(self.args, kind, variant, found, ended))
        self.free.put(device)


def longest(
    args: argparse.Namespace, kind: str, variant: str, found: list[dict[str, Any]], ended: str
) -> dict[str, Any]:
    """The record of a variant's longest sequence; ended_by: "memory", "time", "failure", or "longest" of --longest."""
    fit = sorted((record for record in found if "step_s" in record), key=lambda record: record["tokens"])
    if any("out_of_memory" in record for record in found):
        ended = "memory"
    elif fit and 2 * fit[-1]["tokens"] > args.longest:
        ended = "longest"
    by_memory = None
    if len(fit) > 1 and torch.cuda.is_available():
        before, last = fit[-2:]
        a_token = (last["peak_GiB"] - before["peak_GiB"]) / (last["tokens"] - before["tokens"])
        of_device = torch.cuda.get_device_properties(0).total_memory / 2**30
        by_memory = int(last["tokens"] + (of_device - last["peak_GiB"]) / a_token)
    return {
        "model": kind, "variant": variant, "longest": fit[-1]["tokens"] if fit else None, "ended_by": ended,
        "would_fit": by_memory,
    }  # fmt: skip


def main() -> None:
    args = arguments()
    if args.tiny:
        args.first, args.longest, args.repeat = 64, 128, 1
    if args.one:
        return as_one(args)
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("these models need a GPU; --tiny runs small ones on a CPU")
    where = "cpu" if args.tiny else torch.cuda.get_device_name()
    day = datetime.date.today().isoformat()
    runs = Runs(args)
    runs.say({"date": day, "device": where, "torch": torch.__version__, "transformers": version("transformers")})
    runs.all()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = f"{day}-{where.lower().replace(' ', '-')}-transformers-models.jsonl"
        (args.output / name).write_text("\n".join(runs.lines) + "\n")


if __name__ == "__main__":
    main()
