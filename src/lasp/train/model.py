"""Builds what a run trains: the model, spread over the processes, its first weights, and its optimizer."""

from typing import NamedTuple

import torch

from lasp.errors import ConfigError
from lasp.models import CausalLM, ModelConfig
from lasp.parallelize import ParallelModel, parallelize
from lasp.train.checkpoint import Checkpoint, export, shards
from lasp.train.config import TrainConfig
from lasp.train.optimizer import build_optimizer
from lasp.train.world import World


class TrainedModel(NamedTuple):
    """A model in training: its configuration, the module itself, the same spread over the processes, its optimizer."""

    config: ModelConfig
    module: CausalLM
    parallel: ParallelModel
    optimizer: torch.optim.Optimizer


def model_config(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model's own configuration. Raises ConfigError for one that does not exist, or cannot carry its state."""
    model = config.model.build(vocab_size=vocab_size)
    if config.data.carry and any(mixer.rule == "softmax" for mixer in model.mixers):
        raise ConfigError("--data.carry needs layers whose memory does not grow: this model has softmax attention")
    return model


def build(config: TrainConfig, model: ModelConfig, world: World, resumed: Checkpoint | None) -> TrainedModel:
    """The model that a run begins with: that of the checkpoint it goes on from, of --init-from, or a new one.

    Collective. Raises ConfigError for what the model cannot do, CheckpointError for weights that do not fit.
    """
    torch.manual_seed(config.seed)
    module = CausalLM(model).to(world.device)
    if resumed is None and config.init_from is not None:
        export.load_weights(config.init_from, module)
    parallel = spread(config, module, world)
    optimizer = build_optimizer(parallel, config.optimizer)
    if resumed is not None:
        shards.load(resumed, module, model.to_dict(), optimizer=optimizer, world=world)
    return TrainedModel(model, module, parallel, optimizer)


def check_weights(config: TrainConfig, model: ModelConfig, resumed: Checkpoint | None) -> None:
    """Raise CheckpointError, with what differs, if a new run's --init-from holds another model."""
    if resumed is None and config.init_from is not None:
        export.check(config.init_from, model.to_dict())


def spread(config: TrainConfig, module: CausalLM, world: World) -> ParallelModel:
    """`module` over the processes as the configuration says. Raises ConfigError for what the model cannot do."""
    parallel = config.parallel
    shares = parallel.data_parallel in ("zero2", "zero3") and world.size > 1
    try:
        return parallelize(
            module,
            world.mesh,
            data_parallel=parallel.data_parallel,
            gather_dtype=torch.bfloat16 if shares and config.precision == "bf16" else None,
            cpu_offload=parallel.cpu_offload,
            recomputation=parallel.recomputation,
            ffn_piece_tokens=parallel.ffn_piece_tokens,
            compile=parallel.compile,
            exchange=parallel.exchange,
            timeout_s=parallel.timeout_s,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
