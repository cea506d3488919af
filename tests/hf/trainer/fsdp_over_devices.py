"""A Trainer whose weights accelerate shards by FSDP2, over ranks, or in one process: run by torchrun.

    torchrun --nproc-per-node N tests/hf/trainer/fsdp_over_devices.py cpu|cuda SPLIT ROWS FOLDER

SPLIT processes share a sequence, and each group of them takes ROWS rows a step; over NCCL on a GPU each. One process
trains as transformers does, unsharded. The first rank prints, as JSON, what `test_fsdp_over_devices.py` compares.

accelerate takes FSDP on CPUs for DDP, because of the device alone: there its state is set to FSDP by hand, and what it
then does is its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

sys.path[:0] = [str(Path(__file__).parents[2])]

from hf.small_models import build, exactly  # noqa: E402
from hf.trainer.processes import groups_of  # noqa: E402
from hf.trainer.test_attach import SETTINGS, collate, examples  # noqa: E402

import lasp.hf  # noqa: E402


class ShardingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that shards on CPUs too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp_plugin_args is not None and self.args.use_cpu:
            from accelerate import DistributedType, FullyShardedDataParallelPlugin

            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True


def main() -> None:
    device, split, rows, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ranks = int(os.environ["WORLD_SIZE"])
    sharded: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Mamba2Block"]},
    }
    options = {"per_device_train_batch_size": rows, "save_strategy": "no", "use_cpu": device == "cpu"}
    arguments = TrainingArguments(folder, **(SETTINGS | options | (sharded if ranks > 1 else {})))
    data = {"train_dataset": examples(100, 1), "eval_dataset": examples(8, 2)}
    trainer = ShardingTrainer(build("mamba2"), arguments, data_collator=collate, **data)
    if ranks > 1:
        lasp.hf.attach(trainer, groups_of(split))
    with exactly():
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last layers' stay whole after an evaluation
    weights = [p.detach() for p in trainer.model.parameters()]
    whole = [w.full_tensor() if isinstance(w, DTensor) else w for w in weights]
    if int(os.environ["RANK"]) == 0:
        found = {
            "losses": [entry["loss"] for entry in logs],
            "norms": [float(entry["grad_norm"]) for entry in logs],
            "evaluated": evaluated,
            "weights": torch.cat([w.flatten() for w in whole]).tolist(),
            "is_sharded": all(isinstance(w, DTensor) and w.to_local().numel() < w.numel() for w in weights),
        }
        print(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
