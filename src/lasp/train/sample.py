"""Text from a trained model, piece by piece."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lasp.data.tokenizer import Tokenizer, load_tokenizer
from lasp.generate import stream
from lasp.models import CausalLM, ModelConfig
from lasp.train import checkpoint, export, shards
from lasp.train.config import SampleOptions


class Loaded(NamedTuple):
    """A model read from a checkpoint, with its tokenizer."""

    model: CausalLM
    tokenizer: Tokenizer
    folder: Path


def load(path: Path, *, report: Callable[[str], None]) -> Loaded:
    """The model at `path`, on a GPU if there is one.

    path: a run folder, for its newest good checkpoint; one checkpoint; or a folder of `lasp export`.
    report: told of damaged checkpoints. Raises CheckpointError if there is no good model.
    """
    if export.is_export(path):
        about = export.read(path)
        model = CausalLM(ModelConfig(**about["model_config"]))
        export.load_weights(path, model)
        folder, tokenizer = path, about["tokenizer"]
    else:
        found = checkpoint.find(path, report=report)
        model = CausalLM(ModelConfig(**found.state["model_config"]))
        shards.load(found, model, found.state["model_config"])
        folder, tokenizer = found.folder, found.state["tokenizer"]
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Loaded(model, load_tokenizer(tokenizer), folder)


def stream_text(
    model: nn.Module, tokenizer: Tokenizer, options: SampleOptions, *, seed: int, device: torch.device
) -> Iterator[str]:
    """The prompt, then the text the model continues it with, as it becomes certain.

    An empty prompt starts a new document. device: that the model runs on, which is not always where its weights lie.
    Collective where weights are sharded: every process gets the same text.
    """
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
