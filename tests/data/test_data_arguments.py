"""Whatever is passed to lasp.data where it does not belong: a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from training_runs import write_text

from lasp.data.batches import Sequences
from lasp.data.store import build, open_store, prepare
from lasp.data.tokenizer import ByteTokenizer, load_tokenizer

NEVER = (object(), 1j, [1.0, "x"], b"x", {1: 2})
WORD, FLAG, WHOLE = (*NEVER, 1, None), (*NEVER, 0, "False", None), (*NEVER, 0.5, "3", True, None)
TEXT: dict[str, tuple[Any, ...]] = {
    "suffixes": (*NEVER, ".txt", None, (1,)), "validation_fraction": (*NEVER, "0.1", 0, 1.0, float("nan"), True, None),
    "seed": WHOLE, "field": WORD, "validation_path": (*NEVER, "x", 1), "on_bad_record": (*WORD, "ask"),
    "tokenizer": (*NEVER, "bytes", None),
}  # fmt: skip


def test_bad_values_are_named(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", num_files=4)
    good: dict[str, Any] = {
        "suffixes": (".txt",), "tokenizer": ByteTokenizer(), "validation_fraction": 0.3, "seed": 0,
    }  # fmt: skip
    to_build = {**good, "target": tmp_path / "built", "sources": (text,), "field": "text", "shard_tokens": 1 << 20,
                "progress": lambda done, tokens: None}  # fmt: skip
    cases: list[tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[Any, ...]]]] = [
        (
            build,
            to_build,
            {**TEXT, "target": (*NEVER, "x", None), "sources": (*NEVER, "x", None, ("x",)),
             "shard_tokens": (*WHOLE, 0), "progress": (*NEVER, None)},
        ),
        (
            prepare,
            {**good, "folder": text, "cache": tmp_path / "cache"},
            {**TEXT, "folder": (*NEVER, "x"), "cache": (*NEVER, "x", None), "verify": (*WORD, "all")},
        ),
        (
            open_store,
            {"folder": tmp_path / "built", "verify": True},
            {"folder": (*NEVER, "x", None), "verify": FLAG, "verified": (*NEVER, True)},
        ),
        (
            Sequences,
            {"stream": np.zeros(99, np.int64), "seq_len": 8, "seed": 0},
            {"stream": (object(), 1j, None), "seq_len": (*WHOLE, 0), "seed": WHOLE, "consecutive": FLAG},
        ),
        (load_tokenizer, {"name": "bytes"}, {"name": WORD}),
    ]  # fmt: skip
    found = []
    for function, arguments, bad in cases:
        function(**arguments)  # the control
        for name, values in bad.items():
            for value in values:
                try:
                    function(**{**arguments, name: value})
                    found.append((function, name, value, "accepted"))
                except Exception as error:
                    if not isinstance(error, ValueError) or name not in str(error):
                        found.append((function, name, value, repr(error)))
    assert not found, "\n".join(map(str, found))
