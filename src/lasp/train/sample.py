"""Text from a trained model, piece by piece."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lasp import files
from lasp.data.store import TokenStore
from lasp.data.tokenizer import Tokenizer, read_tokenizer
from lasp.generate import stream
from lasp.models import CausalLM, ModelConfig
from lasp.parallelize import ParallelModel
from lasp.train import checkpoint
from lasp.train.checkpoint import export, shards
from lasp.train.config import SampleOptions, TrainConfig
from lasp.train.logging.output import Output
from lasp.train.world import World


class Loaded(NamedTuple):
    """A model read from a checkpoint, with its tokenizer."""

    model: CausalLM
    tokenizer: Tokenizer
    folder: Path
    prompt: str
    """What its run's sample began with, of its own text."""


def load(path: Path, *, report: Callable[[str], None]) -> Loaded:
    """The model at `path`, on a GPU if there is one.

    path: a run folder, for its newest good checkpoint; one checkpoint; or a folder of `lasp export`.
    report: told of damaged checkpoints. Raises CheckpointError if there is no good model.
    """
    if export.is_export(path):
        about = export.read(path)
        model = CausalLM(ModelConfig.from_dict(about["model_config"]))
        export.load_weights(path, model)
        folder, tokenizer, prompt = path, about["tokenizer_id"], about.get("prompt")
    else:
        found = checkpoint.find(path, report=report)
        model = CausalLM(ModelConfig.from_dict(found.state["model_config"]))
        shards.load(found, model, found.state["model_config"])
        folder, tokenizer = found.folder, found.state["tokenizer"]
        prompt = found.state.get("sample_prompt")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Loaded(model, read_tokenizer(folder, tokenizer), folder, prompt or "")


def stream_text(
    model: nn.Module, tokenizer: Tokenizer, options: SampleOptions, *, seed: int, device: torch.device
) -> Iterator[str]:
    """The prompt, then the text the model continues it with, as it becomes certain.

    An empty prompt, or none, starts a new document. device: that the model runs on, which is not always where its
    weights lie. Collective where weights are sharded: every process gets the same text.
    """
    text = options.prompt or ""
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode(text.encode()).tolist() or [tokenizer.separator]
    prompt = torch.tensor([ids], dtype=torch.int64, device=device)
    decode = tokenizer.decode_stream(ids)
    yield text
    for tokens in stream(
        model,  # type: ignore[arg-type]
        prompt,
        options.num_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=generator,
    ):
        yield decode(int(tokens[0]))
    yield decode(None)


def sample_text(
    config: TrainConfig,
    world: World,
    model: ParallelModel,
    tokenizer: Tokenizer,
    prompt: str,
    output: Output,
    run_dir: Path,
    *,
    autocast_dtype: torch.dtype | None,
) -> None:
    """Generate a run's sample, print it as it comes and keep it in the run folder; collective."""

    def generate() -> dict[str, Any]:
        """The text, of which only the first process prints and keeps anything."""
        output.heading("Generated text")
        options = dataclasses.replace(config.sample, prompt=prompt)
        chosen = "given" if config.sample.prompt is not None else "the first words of the held-out text"
        output.line(f"(after {prompt!r}, {chosen})")
        pieces = []
        with torch.autocast(world.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            for piece in stream_text(model.module, tokenizer, options, seed=config.seed, device=world.device):
                pieces.append(piece)
                output.piece(piece)
        model.release()
        output.line("")
        if world.is_first:
            output.attempt("sample.txt", lambda: files.write(run_dir / "sample.txt", "".join(pieces)))
        return {}

    # Of sharded weights no process has enough to run the model alone; else the others need not.
    if model.is_sharded:
        generate()
    else:
        world.run_on_first(generate)


def first_words(store: TokenStore, tokenizer: Tokenizer, num_chars: int = 24) -> str:
    """A prompt that fits the text: how the first held-out document with words begins, a part of its first line."""
    for start, end in pairwise(store.validation_bounds[:_DOCUMENTS_TRIED].tolist()):
        decode = tokenizer.decode_stream()
        ids = store.validation[start : min(end - 1, start + 4 * num_chars)]
        text = "".join([decode(int(token)) for token in ids]).replace("\ufffd", "").strip()
        shown = text[: min(num_chars, len(text) // 2)].split("\n")[0]
        words = shown[: shown.rfind(" ")] if " " in shown else shown
        if len(words) > 2:
            return words.rstrip()
    return ""


# A text whose first documents have no words has none that fit.
_DOCUMENTS_TRIED = 64
