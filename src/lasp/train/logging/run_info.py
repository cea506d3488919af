"""Describes a run: model, layout, machine, text and versions, written to run.json when it starts."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from lasp import files
from lasp.analysis.model import layers
from lasp.data.store import TokenStore
from lasp.exchange import Auto, Exchange
from lasp.exchange.peer.exchange import is_possible
from lasp.models import ModelConfig, num_parameters
from lasp.parallelize import ParallelModel
from lasp.train.config import TrainConfig
from lasp.train.logging.step_metrics import Machine
from lasp.train.logging.versions import versions
from lasp.train.world import World


def describe(
    config: TrainConfig,
    model_config: ModelConfig,
    model: ParallelModel,
    world: World,
    store: TokenStore,
    machine: Machine,
) -> dict[str, Any]:
    """The description as plain values; collective, because ranks learn which of them share a host."""
    hosts = world.control.nodes if world.control is not None else (1,)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{os.cpu_count()} cores"
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "model": model_config.to_dict(),
        "num_parameters": num_parameters(model_config),
        "flops_per_token": machine.flops_per_token,
        "peak_flops": machine.peak_flops,
        "layout": {
            "dp": world.shard.dp_size,
            "sp": world.shard.sp_size,
            "hosts": list(hosts),
            "exchange": _exchange(config, model_config, model, world),
        },
        "device": {"type": world.device.type, "name": device},
        "text": {
            "source": str(config.data.path or "the Python standard library"),
            "tokenizer": config.data.tokenizer or store.tokenizer,
            "num_bytes": store.num_bytes,
            "num_documents": store.num_documents,
        },
        "versions": {
            **versions(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def write(run_dir: Path, description: dict[str, Any]) -> None:
    files.write(run_dir / "run.json", json.dumps(description, indent=1) + "\n")


def _exchange(config: TrainConfig, model_config: ModelConfig, model: ParallelModel, world: World) -> str | None:
    """The schedule that states travel by; of a cost model, what it chooses for the last layer with a state."""
    if model.sp is None:
        return None
    exchange: Exchange = model.sp.exchange
    states = [layer for layer in layers(model_config) if layer.transition is not None]
    if isinstance(exchange, Auto) and states:
        rows = config.global_batch // (world.shard.dp_size * config.accumulation)
        batch = 1 if config.data.packed else rows
        load, comm = states[-1].load(batch), model.sp.comm
        peers = is_possible(comm, load.summary_bytes, world.device)
        exchange = exchange.choose(load, comm.nodes, peers=peers)
    return exchange.name
