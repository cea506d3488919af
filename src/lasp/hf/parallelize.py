"""A model of transformers, made to run on its rank's part of a batch, and made as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from lasp.halo.functions import MAX_WIDTH
from lasp.hf import library
from lasp.hf.attention import FUNCTION, former_of, name_for
from lasp.hf.dispatch import dispatch, missing, release
from lasp.hf.hooks import (
    LayerEnters,
    LayerLeaves,
    MixerEnters,
    MixerLeaves,
    ModelEnters,
    ModelLeaves,
    add,
    hooks_of,
    remove,
)
from lasp.hf.loss import SharedLoss
from lasp.hf.split import ModelSplit, end
from lasp.hf.table import TYPES, LayerKind, ModelFamily, kind_of
from lasp.kernels.select import BACKENDS
from lasp.sequence import SequenceParallel
from lasp.softmax.functions import METHODS

Model = TypeVar("Model", bound=nn.Module)
# Of frequencies that depend on the longest position of the batch, of which a rank has only its own.
_ROPES = ("dynamic", "longrope")
_LOSSES = (None, "ForCausalLM", "ForConditionalGeneration")
_STATEFUL = (nn.Conv1d, nn.RNNBase)


def parallelize(
    model: Model, sp: SequenceParallel | None, *, softmax_method: str = "auto", backend: str = "auto"
) -> Model:
    """Let a model of transformers run on its rank's part of a batch, as `lasp.hf.shard` gives it.

    Its parameters, their names and its code stay. Without gradients, as in evaluation and generation, it takes whole
    batches as before, and so do other models of the process. Before or after PEFT, DDP and FSDP2.

    Args:
        model: a PreTrainedModel, or a module that holds one.
        sp: the ranks that share the sequences, and how states cross them; None for one process with this library's
            kernels.
        softmax_method: how softmax layers exchange, as in `lasp.softmax_attention`; "auto" is "ulysses" where the ranks
            divide the heads and the layer has no sliding window, else "all_gather".
        backend: of recurrences, as in `lasp.linear_attention`.

    Returns:
        the model.

    Raises:
        ValueError: transformers is missing, or something in the model cannot be split; nothing is changed then.
    """
    pretrained = library.load("modeling_utils").PreTrainedModel
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model of transformers, got {type(model).__name__}")
    if sp is not None and not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel or None, got {type(sp).__name__}")
    for name, value, known in (("softmax_method", softmax_method, METHODS), ("backend", backend, BACKENDS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if next(hooks_of(model), None) is not None:
        raise ValueError("the model is parallelized already: lasp.hf.restore(model) first")
    models = {name: module for name, module in model.named_modules() if isinstance(module, pretrained)}
    if not models:
        raise ValueError(f"model must be a model of transformers, and {type(model).__name__} holds none")
    layers = {name: kind for name, module in model.named_modules() if (kind := kind_of(module)) is not None}
    families = _checked(model, models, layers)
    if sp is not None and softmax_method == "ulysses":
        _check_heads(model, layers, sp)
    split = ModelSplit(sp, softmax_method, backend, frozenset(family.file for family in families.values()))
    for family in families.values():
        dispatch(family)
    _add_hooks(model, models, layers, split)
    for module in models.values():
        if module.loss_type is not None:
            module._loss_function = SharedLoss(split, module.loss_function, vars(module).get("_loss_function"))
    for module in _outermost(models):
        _rename_attention(module, name_for)
    return model


def restore(model: Model) -> Model:
    """Undo `parallelize`. Returns the model.

    Raises:
        ValueError: it is not parallelized.
    """
    split = next((hook.split for hook in hooks_of(model)), None)
    if split is None:
        raise ValueError("the model is not parallelized")
    pretrained = library.load("modeling_utils").PreTrainedModel
    models = {name: module for name, module in model.named_modules() if isinstance(module, pretrained)}
    remove(model)
    for module in models.values():
        loss = vars(module).get("_loss_function")
        if isinstance(loss, SharedLoss):
            del module._loss_function
            if loss.former is not None:
                module._loss_function = loss.former
    for module in _outermost(models):
        _rename_attention(module, lambda name: former_of(name) or name)
    end(split)
    for family in {family.file: family for family in TYPES.values() if family.file in split.files}.values():
        release(family)
    return model


def _checked(model: nn.Module, models: Mapping[str, Any], layers: Mapping[str, LayerKind]) -> dict[str, ModelFamily]:
    """The families that the model is of.

    Raises:
        ValueError: some part of it is unknown, or is known not to be split.
    """
    families = {}
    outermost = _outermost(models)
    for name, module in models.items():
        kind = module.config.model_type
        # Of a model in another, as for images, the layers count: it has none that see tokens of the text.
        if module not in outermost and not any(_is_within(layer, name) for layer in layers):
            continue
        if kind not in TYPES:
            raise ValueError(
                f"{name or type(module).__name__} is of the type {kind!r}, which cannot be split yet; known: "
                f"{', '.join(sorted(TYPES))}"
            )
        families[TYPES[kind].file] = TYPES[kind]
        if module.loss_type not in _LOSSES:
            raise ValueError(
                f"{type(module).__name__} has another loss than that of the next token, which is no sum over tokens: "
                "use the causal language model"
            )
        _check_config(name or type(module).__name__, module)
    for family in families.values():
        if gone := missing(family):
            raise ValueError(
                f"this transformers has no {', '.join(gone)} in {family.file}: use a version that lasp.hf knows"
            )
    for name, module in model.named_modules():
        if isinstance(module, _STATEFUL) and not any(_is_within(name, layer) for layer in layers):
            raise ValueError(f"{name} is a {type(module).__name__} outside of the known layers: it cannot be split")
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > MAX_WIDTH:
            raise ValueError(f"{name} is {module.kernel_size[0]} tokens wide; convolutions have up to {MAX_WIDTH}")
    for name, kind in layers.items():
        if kind.is_attention and getattr(model.get_submodule(name), "attention_dropout", False):
            raise ValueError(f"{name} has dropout of attention weights: set config.attention_dropout to 0")
    if not any(not kind.is_attention for kind in layers.values()):
        raise ValueError("the model has no layer that lasp.hf knows how to split")
    return families


def _check_config(name: str, module: Any) -> None:
    config = module.config
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if part.get("rope_type") in _ROPES:
            raise ValueError(
                f"{name} has rotary positions of the type {part['rope_type']!r}, whose frequencies depend on the "
                "longest position of a batch: use 'default', 'linear', 'yarn' or 'llama3'"
            )
    if getattr(config, "z_loss_coefficient", 0.0):
        raise ValueError(f"{name} adds a loss of its logits' size: set config.z_loss_coefficient to 0")


def _check_heads(model: nn.Module, layers: Mapping[str, LayerKind], sp: SequenceParallel) -> None:
    for name, kind in layers.items():
        config: Any = getattr(model.get_submodule(name), "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if kind.is_attention and heads is not None and heads % sp.size:
            raise ValueError(
                f"softmax_method 'ulysses' gives each rank some of the heads, and {sp.size} ranks do not divide the "
                f"{heads} of {name}: use 'all_gather' or 'auto'"
            )


def _add_hooks(model: nn.Module, models: Mapping[str, Any], layers: Mapping[str, LayerKind], split: ModelSplit) -> None:
    recomputed = library.load("modeling_layers").GradientCheckpointingLayer
    for name, module in model.named_modules():
        if name in models:
            add(ModelEnters(split, name or type(module).__name__), module)
            add(ModelLeaves(split, name), module)
        elif isinstance(module, recomputed):
            add(LayerEnters(split, name), module)
            add(LayerLeaves(split, name), module)
        if name in layers:
            wanted = layers[name].functions or (FUNCTION,)
            add(MixerEnters(split, name, frozenset(wanted)), module)
            add(MixerLeaves(split, name), module)


def _outermost(models: Mapping[str, Any]) -> list[Any]:
    """Models that are in no other."""
    return [
        module
        for name, module in models.items()
        if not any(_is_within(name, other) for other in models if name != other)
    ]


def _is_within(name: str, other: str) -> bool:
    """Returns whether a module's name is another's, or of one in it."""
    return not other or name == other or name.startswith(other + ".")


def _rename_attention(module: Any, rename: Any) -> None:
    """Set the attention function of a model and of the models in it, each by the one that it has."""
    parts = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    for config in parts.values():
        if hasattr(config, "_attn_implementation_internal") and config._attn_implementation is not None:
            config._attn_implementation_internal = rename(config._attn_implementation)
