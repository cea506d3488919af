"""Finetune a model of Hugging Face transformers on long documents, its sequences spread over processes.

    python hf_finetune.py MODEL DATA.jsonl OUT
    torchrun --nproc-per-node 4 hf_finetune.py MODEL DATA.jsonl OUT --tokens 131072 --sequence-parallel 4

A line of the data is {"text": ..}, or {"prompt": .., "completion": ..}, of which only the completion is learned.
Documents are packed into sequences of --tokens; none sees another. With more processes than --sequence-parallel, groups
of so many work on different sequences. Edit it: it is yours.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import lasp


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model and its tokenizer")
    parser.add_argument("data", type=Path, help="file of JSON lines")
    parser.add_argument("out", type=Path, help="new folder for the model")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence; longer documents are cut")
    parser.add_argument("--accumulate", type=int, default=1, help="sequences of each group in a step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=10, help="steps in which the learning rate rises")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    parser.add_argument("--sequence-parallel", type=int, help="processes that share a sequence; all by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA's matrices; 0 trains all weights")
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of layers for backward")
    parser.add_argument("--no-check", action="store_true", help="do not compare the split model with the whole first")
    return parser.parse_args()


def start(sequence_parallel: int | None) -> tuple[torch.device, lasp.SequenceParallel, int, int]:
    """Join the other processes: the device, the ranks that share sequences, which group this is, of how many."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks, size = dist.get_world_size(), sequence_parallel or dist.get_world_size()
    if ranks % size:
        raise SystemExit(f"--sequence-parallel {size} does not divide the {ranks} processes")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = dist.init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("groups", "sp"))
    return device, lasp.SequenceParallel(mesh["sp"]), mesh["groups"].get_local_rank(), ranks // size


def documents(path: Path, tokenizer: Any, tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of every document, at most `tokens` long."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if "text" not in row and not {"prompt", "completion"} <= row.keys():
                raise SystemExit(f"{path}, line {number}: no text, and no prompt and completion")
            question = tokenizer(row["prompt"]).input_ids if "prompt" in row else []
            answer = tokenizer(row["completion"], add_special_tokens=False) if question else tokenizer(row["text"])
            ids = [*question, *answer.input_ids, *end]
            labels = [-100] * len(question) + ids[len(question) :]
            labels[:1] = [-100]  # of a first token; what came before is another document
            if len(ids) > 1:
                yield ids[:tokens], labels[:tokens]


def packed(path: Path, tokenizer: Any, tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one sequence [1, up to `tokens`] of documents. Where positions start anew, so does a document."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}

    def batch() -> dict[str, torch.Tensor]:
        return {name: torch.tensor([values]) for name, values in row.items()}

    for ids, labels in documents(path, tokenizer, tokens):
        if row["input_ids"] and len(row["input_ids"]) + len(ids) > tokens:
            yield batch()
            row = {name: [] for name in row}
        for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", range(len(ids)))):
            row[name].extend(values)
    if row["input_ids"]:
        yield batch()


def load(args: argparse.Namespace, device: torch.device) -> Any:
    """The model, in training."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear"))
    if args.recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lasp.hf.keeping_exchanges})
    return model.train()


def average(parameters: list[torch.nn.Parameter]) -> None:
    """Make gradients their mean over all processes, which is the gradient of the mean loss of the groups."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def main() -> None:
    """Train, and write the model."""
    args = arguments()
    torch.manual_seed(0)  # LoRA's matrices are the same in every process
    device, sp, group, groups = start(args.sequence_parallel)
    is_first = dist.get_rank() == 0
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load(args, device)
    words, known = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if words > known:
        raise SystemExit(f"{args.model}: the tokenizer has {words} tokens, and the model embeds {known}")
    lasp.hf.parallelize(model, sp)
    if is_first:
        for layer in lasp.hf.describe(model):
            print(f"{layer.name}: {layer.layer} by {', '.join(layer.operators)}; across ranks: {layer.exchange}")
    if not args.no_check:
        found = lasp.hf.check(model, sp)
        if not found.passes:
            raise SystemExit(f"the split model is not the same model: {found}")
        if is_first:
            print(f"split against whole: errors of loss {found.loss:.0e}, of gradients {found.gradients:.0e}")

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    step, waiting = 0, []
    for _epoch in range(args.epochs):
        for batch in packed(args.data, tokenizer, args.tokens):
            if batch["input_ids"].shape[1] < sp.size:
                continue  # fewer tokens than ranks
            waiting.append(batch)
            if len(waiting) < groups * args.accumulate:
                continue
            total = 0.0
            for batch in waiting[group::groups]:
                part = lasp.hf.shard({name: value.to(device) for name, value in batch.items()}, sp)
                loss = model(**part).loss / args.accumulate
                loss.backward()
                total += loss.item()
            waiting, step = [], step + 1
            average(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            for options in optimizer.param_groups:
                options["lr"] = args.learning_rate * min(1.0, step / max(1, args.warmup))
            optimizer.step()
            optimizer.zero_grad()
            if is_first:
                print(f"step {step}: loss {total:.4f}, gradient norm {norm:.3f}", flush=True)

    if step == 0:
        raise SystemExit(f"{args.data} has too few tokens for a step: lower --tokens or --accumulate")
    if is_first:
        lasp.hf.restore(model)
        model = model.merge_and_unload() if args.lora else model
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        print(f"written to {args.out}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
