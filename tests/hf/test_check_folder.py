"""`lasp check --hf` as a user runs it, on folders with and without weights, and on one that it does not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf.small_models import SMALL, build


def run(folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "lasp", "check", "--hf", str(folder), "--exchange", "doubling", "--seq-len", "61"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "qwen3_5"])
def test_a_folder_of_every_type(kind: str, tmp_path: Path) -> None:
    """Half of them with weights; the others' decays are made slow."""
    model = build(kind, torch.float32)
    if list(SMALL).index(kind) % 2:
        model.save_pretrained(tmp_path)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
    code, printed = run(tmp_path)
    assert code == 0 and "is the same model" in printed, printed
    assert ("its weights" in printed) == bool(list(SMALL).index(kind) % 2)


@pytest.mark.exhaustive
def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    about = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**about, "intermediate_size": 32, "vocab_size": 96}))
    code, printed = run(tmp_path)
    assert code == 64 and "is of the type 'llama', which cannot be split yet; known: bailing_hybrid" in printed, printed
    code, printed = run(tmp_path / "elsewhere")
    assert code == 64 and "has no config.json" in printed, printed
