"""Text from a trained model, piece by piece."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lasp.data.tokenizer import Tokenizer, load_tokenizer
from lasp.generate import stream
from lasp.models import CausalLM, ModelConfig
from lasp.train import checkpoint
from lasp.train.config import SampleOptions


class Loaded(NamedTuple):
    """A model read from a checkpoint, with its tokenizer."""

    model: CausalLM
    tokenizer: Tokenizer
    step: int
    folder: Path


def load(path: Path, *, report: Callable[[str], None]) -> Loaded:
    """The model of a run folder's newest good checkpoint, or of the checkpoint at `path`; on a GPU if there is one.

    report: told of damaged checkpoints. Raises CheckpointError if there is no good one.
    """
    found = checkpoint.find(path, report=report)
    config = ModelConfig(**found.state["model_config"])
    model = CausalLM(config)
    checkpoint.load_model(found, model, found.state["model_config"])
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Loaded(model, load_tokenizer(found.state["tokenizer"]), int(found.state["step"]), found.folder)


def stream_text(model: nn.Module, tokenizer: Tokenizer, options: SampleOptions, *, seed: int) -> Iterator[str]:
    """The prompt, then the text the model continues it with, as it becomes certain.

    An empty prompt starts a new document.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode(options.prompt.encode()).tolist() or [tokenizer.separator]
    prompt = torch.tensor([ids], dtype=torch.int64, device=device)
    decode = tokenizer.decode_stream()
    yield options.prompt
    for tokens in stream(
        model,  # type: ignore[arg-type]
        prompt,
        options.num_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=generator,
    ):
        yield decode(int(tokens[0]))
