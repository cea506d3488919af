"""Compares a model split over processes with the same model on one: loss, every gradient and generated logits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from lasp import SequenceParallel
from lasp.distributed import process_group
from lasp.errors import ConfigError, as_config_errors
from lasp.exchange import EXCHANGES, ExchangeResult
from lasp.generate import prefill
from lasp.layers import ConstantDecay, SteppedDecay
from lasp.models import CausalLM
from lasp.models.presets import BYTE_VOCABULARY
from lasp.sequence.sequence_parallel import balanced_lengths
from lasp.train.config import ModelOptions
from lasp.train.preflight import check_gpus, check_seed
from lasp.train.settings_file import load_toml
from lasp.train.sizes import Tokens

# Relative errors that rounding alone does not reach; a lost state is off by far more.
BOUNDS = {"fp64": 1e-9, "fp32": 2e-4}
# Decays of a model as configured may be so fast that a lost state is not seen. Divided by this, none is.
SLOWER = 1000.0


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Compare a model whose sequence is split over processes with the same model in one process, on this machine.

    Loss, the gradient of every parameter, and the logits of generated tokens, for every exchange, equal and unequal
    shards, the model's own decay and a slow one. Exit code 0 if all agree, 1 if not.
    """

    config: Path | None = None
    """TOML file of a training run: its model is checked."""
    hf: Path | None = None
    """Folder of a model of transformers, with or without weights: a few layers of every kind are checked."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """The model, where no --config is given."""
    sp: int = 2
    """Processes that share the sequence."""
    exchange: str = "all"
    """How states travel between processes; "all" for every way there is."""
    seq_len: Tokens = 200
    """Tokens of the sequence."""
    batch: int = 2
    """Sequences."""
    new_tokens: int = 8
    """Tokens generated after the sequence."""
    precision: Literal["fp64", "fp32"] = "fp64"
    """fp64 tells mistakes from rounding best; fp32 also runs kernels that have no fp64."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Processes may share a GPU."""
    seed: int = 0

    @property
    def checked_model(self) -> ModelOptions:
        """The model of --config where there is one. Raises ConfigError if it cannot be read."""
        return self.model if self.config is None else load_toml(self.config).model

    def validate(self) -> None:
        """Raises ConfigError if a value means nothing."""
        if self.exchange not in ("all", *EXCHANGES):
            raise ConfigError(f"--exchange must be all or one of {', '.join(EXCHANGES)}, got {self.exchange!r}")
        if self.hf is None:
            self.checked_model.build()
        elif not (self.hf / "config.json").is_file():
            raise ConfigError(f"--hf must be the folder of a model of transformers, and {self.hf} has no config.json")
        check_seed("--seed", self.seed)
        check_gpus(self.device, 1)
        for name, count, least in (
            ("--sp", self.sp, 1),
            ("--seq-len", self.seq_len, 2 * self.sp),
            ("--batch", self.batch, 1),
            ("--new-tokens", self.new_tokens, 1),
        ):
            if count < least:
                raise ConfigError(f"{name} must be at least {least}, got {count}")


class Row(NamedTuple):
    """One comparison: relative errors, the largest over ranks."""

    decay: str
    exchange: str
    shards: str
    loss: float
    gradient: float
    parameter: str
    logits: float

    def passes(self, bound: float) -> bool:
        return max(self.loss, self.gradient, self.logits) < bound


def run(config: CheckConfig, *, broken: bool = False) -> list[Row]:
    """Compare in this process, one of `config.sp` that a launcher started; the same rows on all.

    broken: every exchange forgets the state it carries. Raises ConfigError for another number of processes.
    """
    with started(config):
        return _compare(config, broken)


@contextmanager
def started(config: CheckConfig) -> Iterator[None]:
    """Within, the processes are joined. Raises ConfigError for another number of them."""
    if int(os.environ["WORLD_SIZE"]) != config.sp:
        raise ConfigError(f"--sp {config.sp} needs as many processes, found {os.environ['WORLD_SIZE']}")
    # NCCL refuses two processes on one GPU; gloo does not, and shows the same.
    own_gpu = config.device == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    process_group.start(torch.device("cuda" if own_gpu else "cpu"), timeout_s=300)
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_of(config: CheckConfig) -> torch.device:
    """This process's; a GPU that it may share is made the current one."""
    if config.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _compare(config: CheckConfig, broken: bool) -> list[Row]:
    tokens, labels, model = _problem(config)
    names = list(EXCHANGES) if config.exchange == "all" else [config.exchange]
    rows = []
    for decay, factor in (("own", 1.0), ("slow", 1.0 / SLOWER)):
        _scale_decays(model, factor)
        with as_config_errors():
            expected = _measure(model, tokens, labels, config.new_tokens, None)
        for name in names:
            exchange: Any = _forgetful(EXCHANGES[name]()) if broken else name
            base = SequenceParallel(dist.group.WORLD, exchange=exchange)  # type: ignore[arg-type]
            for shards, lengths in (("equal", _lengths(config, 0)), ("unequal", _lengths(config, 1))):
                with as_config_errors():
                    got = _measure(model, tokens, labels, config.new_tokens, base.with_lengths(lengths))
                errors = {key: _error(got[2][key], expected[2][key]) for key in expected[2]}
                worst = max(errors, key=lambda key: errors[key])
                local = torch.tensor(
                    [_error(got[0], expected[0]), errors[worst], _error(got[1], expected[1])], dtype=torch.float64
                )
                # Gradients are whole on every rank by now; logits may still differ between them.
                largest = (
                    base.comm.all_gather(local.to(tokens.device)).wait().amax(0).tolist()
                    if base.size > 1
                    else local.tolist()
                )
                rows.append(Row(decay, name, shards, largest[0], largest[1], worst, largest[2]))
    return rows


def _problem(config: CheckConfig) -> tuple[Any, Any, Any]:
    """Tokens, labels and model, the same on every rank."""
    options = config.checked_model
    device = device_of(config)
    model = CausalLM(options.build(vocab_size=BYTE_VOCABULARY))
    generator = torch.Generator().manual_seed(config.seed)
    model.init_weights(generator)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    text = torch.randint(model.config.vocab_size, (config.batch, config.seq_len + 1), generator=generator)
    return text[:, :-1].to(device), text[:, 1:].to(device), model.to(device, dtype)


def _scale_decays(model: Any, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, (ConstantDecay, SteppedDecay)):
            module.scale(factor)


def _lengths(config: CheckConfig, unevenness: int) -> tuple[int, ...]:
    """Shards that differ by at most a token, or (1) the first of a single token and the last of most."""
    if not unevenness or config.sp == 1:
        return balanced_lengths(config.seq_len, config.sp)
    weights = [1 + 2 * rank for rank in range(1, config.sp)]
    middle = [(config.seq_len - 1) * weight // sum(weights) for weight in weights]
    return (1, *middle[:-1], config.seq_len - 1 - sum(middle[:-1]))


def _measure(model: Any, tokens: Any, labels: Any, new_tokens: int, sp: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Mean loss, logits of generated tokens, gradient of every parameter; over the whole sequence on every rank."""
    model.zero_grad(set_to_none=True)

    def shard(tensor: Any) -> Any:
        return tensor if sp is None else sp.shard(tensor)

    loss = model(shard(tokens), labels=shard(labels), sp=sp).loss_sum / tokens.numel()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss = loss.detach()
    if sp is not None:
        loss = sp.comm.sum(loss[None])[0]
        gradients = {name: sp.comm.sum(gradient) for name, gradient in gradients.items()}
    with torch.no_grad():
        logits, cache = prefill(model, shard(tokens), sp=sp)
        generated = [logits]
        for token in range(new_tokens - 1):
            # Given tokens, not the likeliest: a tie broken by rounding would compare different texts.
            out = model(labels[:, token : token + 1], cache=cache, output_cache=True)
            cache = out.cache
            generated.append(out.logits[:, -1])
    return loss, torch.stack(generated), gradients


def _error(value: Any, reference: Any) -> float:
    """||value - reference|| / ||reference||; infinite for NaN."""
    size = reference.norm().item()
    error = (value - reference).norm().item() / (size if size > 0 else 1.0)
    return float("inf") if error != error else float(error)


def _forgetful(exchange: Any) -> Any:
    """An exchange that carries nothing, for the control."""

    class Forgetful(type(exchange)):  # type: ignore[misc]
        name = exchange.name

        def __init__(self) -> None:
            pass

        def begin(self, comm: Any, summary: Any, initial: Any, **options: Any) -> Any:
            pending = exchange.begin(comm, summary, initial, **options)

            class Forgotten:
                def wait(self) -> ExchangeResult:
                    return ExchangeResult(initial, pending.wait().total)

            return Forgotten()

    return Forgetful()
