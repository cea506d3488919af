"""Published models by name and size, as the files of lasp.layers register them. Where each number comes from stands in
docs/design/models.md."""

from __future__ import annotations

from typing import Any

from lasp.layers import FAMILIES
from lasp.layers.fields import check_choice
from lasp.models.config import ModelConfig, from_settings

BYTE_VOCABULARY = 257  # 256 bytes and the end of a document

NAMES = tuple(FAMILIES)
SIZES = tuple(dict.fromkeys(size for family in FAMILIES.values() for size in family.sizes))


def sizes(name: str) -> tuple[str, ...]:
    """The sizes of a family."""
    check_choice("model name", name, NAMES)
    return tuple(FAMILIES[name].sizes)


def preset(name: str, size: str, **overrides: Any) -> ModelConfig:
    """The configuration of a published model.

    Args:
        name: one of NAMES.
        size: one of `sizes(name)`: "tiny" (bytes, under 1M parameters), "0.4b", "1b" or "7b".
        overrides: any setting that `from_settings` takes, above all `vocab_size`.

    Raises:
        ValueError: unknown name, size or field, or a combination ModelConfig refuses.
    """
    if size not in sizes(name):
        raise ValueError(f"unknown size {size!r} of {name}; known: {', '.join(sizes(name))}")
    family = FAMILIES[name]
    values: dict[str, Any] = {**family.settings, **family.sizes[size]}
    if size == "tiny":
        values |= {"vocab_size": BYTE_VOCABULARY, "tied_embeddings": True}
        if family.settings.get("init") != "xavier":
            # 0.02 is about 2048 ** -0.5: too small a start at this width
            values["init_std"] = values["d_model"] ** -0.5
    return from_settings({**values, **overrides})
