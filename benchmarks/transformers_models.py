"""Models of transformers on one GPU, as they come and with this library's kernels: tokens/s, memory, longest sequence.

    python benchmarks/transformers_models.py --output benchmarks/results            # with --with-fla DIR, fla's too
    python benchmarks/transformers_models.py --tiny                                 # the script itself, on a CPU

`transformers` is the model as it comes; `transformers+fla` the same with the flash-linear-attention of --with-fla;
`lasp` is `lasp.hf.parallelize(model, None)`. Weights are random, in bf16, layers are recomputed in backward. A step is
forward, backward and a step of SGD, on one sequence; sequences double until a step does not fit or takes longer than
--step-seconds. Each variant has a process of its own. `two` compares two processes over gloo on the GPU with one: loss,
logits and gradients of a model of four layers.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
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
TINY: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "hidden_size": 32, "num_hidden_layers": 4, "layer_types": QWEN3_NEXT["layer_types"][:4],
        "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 16,
    },
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=["transformers", "transformers+fla", "lasp", "two"])
    parser.add_argument("--with-fla", type=Path, help="folder with flash-linear-attention")
    parser.add_argument("--first", type=int, default=4096, help="tokens of the shortest sequence")
    parser.add_argument("--longest", type=int, default=1 << 20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--step-seconds", type=float, default=8.0)
    parser.add_argument("--variant-seconds", type=float, default=50.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
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


def measure(args: argparse.Namespace, kind: str, variant: str) -> Iterator[dict[str, Any]]:
    """A record for every length."""
    import lasp
    import lasp.hf

    device = device_of(args)
    model = build(args, kind, device, torch.float32 if args.tiny else torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(parameter.numel() for parameter in model.parameters())
    if variant == "lasp":
        lasp.hf.parallelize(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens, end = args.first, time.monotonic() + args.variant_seconds
    while tokens <= args.longest and time.monotonic() < end:
        batch = batch_of(model, tokens)
        part = lasp.hf.shard(batch, None) if variant == "lasp" else batch
        record = {"model": kind, "variant": variant, "weights": weights, "tokens": tokens}
        try:
            seconds = []
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(1 + args.repeat):  # the first compiles
                start = time.perf_counter()
                loss = model(**part).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                if sum(seconds[1:]) > args.step_seconds:
                    break
        except torch.OutOfMemoryError:
            yield {**record, "out_of_memory": True}
            return
        best = statistics.median(seconds[1:] or seconds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        yield {
            **record, "loss": loss.item(), "step_s": best, "tokens_per_s": tokens / best, "peak_GiB": peak,
            "spread": (max(seconds[1:]) - min(seconds[1:])) / best if seconds[1:] else None,
        }  # fmt: skip
        if best > args.step_seconds:
            return
        tokens *= 2


def two(args: argparse.Namespace, kind: str) -> Iterator[dict[str, Any]]:
    """Two processes against one, in fp32 and bf16: relative errors, the largest over ranks."""
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
    tokens = 61 if args.tiny else 2500

    def measured(sp: Any, lengths: tuple[int, ...] | None, *, split: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        model = build(args, kind, device_of(args), dtype, 4)
        batch = batch_of(model, tokens)
        if split:
            lasp.hf.parallelize(model, sp)
            batch = lasp.hf.shard(batch, sp, lengths)
        output = model(**batch)
        output.loss.backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        return output.loss.detach(), output.logits.detach(), gradients

    lengths = (tokens // 3, tokens - tokens // 3)
    loss, logits, gradients = measured(sp, lengths)
    gradients = {name: sp.sum(gradient) / 2 for name, gradient in gradients.items()}
    here = slice(sum(lengths[: sp.rank]), sum(lengths[: sp.rank + 1]))
    found: dict[str, float] = {}
    for against, split in (("lasp", True), ("transformers", False)):
        whole = measured(None, None, split=split)
        found |= {
            f"loss_to_{against}": error(loss, whole[0]),
            f"logits_to_{against}": error(logits, whole[1][:, here]),
            f"gradients_to_{against}": error(flat(gradients), flat(whole[2])),
        }
    return found


def flat(gradients: dict[str, Any]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def main() -> None:
    args = arguments()
    if args.tiny:
        args.first, args.longest, args.repeat = 64, 128, 1
    if args.one:
        kind, variant = args.one
        with contextlib.suppress(torch.OutOfMemoryError):
            for record in two(args, kind) if variant == "two" else measure(args, kind, variant):
                print(json.dumps(record), flush=True)
        return
    where = "cpu" if args.tiny else torch.cuda.get_device_name()
    heading = {
        "date": datetime.date.today().isoformat(),
        "device": where,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    lines = [json.dumps(heading)]
    print(lines[0], flush=True)
    for kind in args.models:
        for variant in args.variants:
            path = [str(args.with_fla)] if variant == "transformers+fla" and args.with_fla else []
            if variant == "transformers+fla" and not path:
                continue
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
            again = [sys.executable, *sys.argv, "--one", kind, variant]
            ran = subprocess.Popen(again, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert ran.stdout is not None and ran.stderr is not None
            for line in ran.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip())
            errors = ran.stderr.read()
            if ran.wait():
                lines.append(json.dumps({"model": kind, "variant": variant, "failed": errors[-2000:]}))
                print(lines[-1], flush=True)
    if args.output:
        name = f"{heading['date']}-{where.lower().replace(' ', '-')}-transformers-models.jsonl"
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
