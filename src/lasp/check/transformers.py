"""Compares a model of transformers, split over processes, with itself on one: layer by layer, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import lasp.hf
from lasp import SequenceParallel
from lasp.check.compare import CheckConfig, device_of, started
from lasp.errors import as_config_errors
from lasp.exchange import EXCHANGES
from lasp.hf import library
from lasp.hf.check import Comparison, LayerErrors, check_layers
from lasp.hf.describe import LayerReport
from lasp.hf.exact import exactly

BOUND = 1e-9
_WEIGHTS = ("*.safetensors", "*.bin")
# Of a model with random weights, which need not be large.
_VOCABULARY, _EXPERTS = 1024, 8


class ModelReport(NamedTuple):
    """Result of a comparison.

    Attributes:
        title: the model, and how much of it was compared.
        layers: what is done with each, and its errors with the first exchange.
        totals: of the whole model, for each exchange.
    """

    title: str
    layers: list[tuple[LayerReport, LayerErrors]]
    totals: dict[str, Comparison]

    @property
    def passes(self) -> bool:
        found = [max(total.loss, total.logits, total.gradients) for total in self.totals.values()]
        return max(*found, *(max(errors.output, errors.gradients) for _, errors in self.layers)) < BOUND


def run(config: CheckConfig) -> ModelReport:
    """Compare in this process, one of `config.sp` that a launcher started; the same on all.

    Raises:
        ConfigError: the folder has no model that can be split, with a remedy.
    """
    assert config.hf is not None
    with started(config), as_config_errors():
        title, model = _model(config, config.hf)
        names = ["auto", *EXCHANGES] if config.exchange == "all" else [config.exchange]
        totals: dict[str, Comparison] = {}
        layers: list[tuple[LayerReport, LayerErrors]] = []
        for name in names:
            sp = SequenceParallel(dist.group.WORLD, exchange=name)
            lasp.hf.parallelize(model, sp)
            reports = lasp.hf.describe(model)
            with exactly():
                total, errors = check_layers(
                    model, sp, [report.name for report in reports], tokens=config.seq_len, seed=config.seed
                )
            layers = layers or list(zip(reports, errors, strict=True))
            totals[name] = total
            lasp.hf.restore(model)
        return ModelReport(title, layers, totals)


def _model(config: CheckConfig, folder: Path) -> tuple[str, Any]:
    """The first layers of a model, as many as hold one of every kind, in fp64; random if the folder has no weights."""
    transformers = library.load()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    whole = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    has_weights = any(next(folder.glob(form), None) for form in _WEIGHTS)
    settings, text = whole.to_dict(), whole.get_text_config()
    part = settings["text_config"] if text is not whole else settings
    layers, kept = text.num_hidden_layers, _kept(text)
    kinds = [name for name, value in part.items() if isinstance(value, list) and {*map(type, value)} == {str}]
    part.update({name: part[name][:kept] for name in kinds if len(part[name]) == layers})
    part["num_hidden_layers"] = kept
    if not has_weights:
        part["vocab_size"] = min(part["vocab_size"], _VOCABULARY)
        part.update({name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in part})
        experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if part.get(name)]
        part.update({name: min(part[name], max(_EXPERTS, part.get("num_experts_per_tok", 1))) for name in experts})
    small = type(whole).from_dict(settings)
    kind = transformers.AutoModelForCausalLM
    if has_weights:
        model = kind.from_pretrained(folder, config=small, dtype=torch.float64, local_files_only=True)
        model = model.double()  # some types keep a few weights in fp32 whatever is asked for
    else:
        model = _random(kind, small, config.seed)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no fp64
    weights = "its weights" if has_weights else "random weights"
    title = f"{type(model).__name__}, {kept} of {layers} layers, {weights}"
    return title, model.to(device_of(config)).train()


def _kept(text: Any) -> int:
    """The number of first layers among which is one of every kind."""
    lists = [getattr(text, name, None) for name in ("layer_types", "mlp_layer_types")]
    kinds = list(zip(*(kinds for kinds in lists if kinds), strict=False))
    if not kinds:
        return min(2, int(text.num_hidden_layers))
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def _random(kind: Any, config: Any, seed: int) -> Any:
    """A model whose decays are slow, and whose outputs depend on its inputs: default ones hide a lost state."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)  # decays that are buffers are computed when a model is made
    try:
        model = kind.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-4, -2, parameter.numel()).view_as(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.double()
