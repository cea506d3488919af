"""The example that finetunes a model folder: two processes learn as one does, and what they write is a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import world
from hf.small_models import VOCABULARY, build, tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_finetune.py"


def model_folder(folder: Path) -> Path:
    """A small model and its tokenizer, whose words are numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build("qwen3_next", torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, "0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2").save_pretrained(folder)
    return folder


def data(file: Path) -> Path:
    """Documents of several lengths, some of them answers."""
    lines = []
    for number, row in enumerate(tokens(12, 60).tolist()):
        text = [" ".join(map(str, part)) for part in (row[:10], row[10 : 20 + 3 * number])]
        lines.append({"text": " ".join(text)} if number % 2 else {"prompt": text[0], "completion": text[1]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.exhaustive
@pytest.mark.parametrize("lora", [False, True] if find_spec("peft") else [False])
def test_two_processes_finetune_as_one_does(lora: bool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file, printed = model_folder(tmp_path / "model"), data(tmp_path / "data.jsonl"), []
    options = ["--tokens", "120", "--learning-rate", "1e-3", "--dtype", "float32", "--epochs", "2", "--recompute"]
    options += ["--lora", "4"] if lora else []
    for processes in (1, 2):
        start = [sys.executable] if processes == 1 else world.torchrun(processes)
        out = tmp_path / f"out-{processes}"
        ran = subprocess.run(
            [*start, str(EXAMPLE), str(source), str(file), str(out), *options],
            capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    assert "linear_attn: Qwen3NextGatedDeltaNet by short_convolution, delta_rule" in printed[1]
    assert "keys and values" in printed[1] or "tokens for heads" in printed[1]
    losses = [[float(loss) for loss in re.findall(r"loss ([\d.]+), gradient", text)] for text in printed]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and len(losses[0]) >= 6 and losses[0][-1] < losses[0][0]
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{processes}").state_dict() for processes in (1, 2)
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(two[name], weight, atol=1e-3) for name, weight in one.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out-2")("5 6").input_ids == [5, 6]
