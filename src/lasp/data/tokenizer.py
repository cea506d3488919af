"""Text to token ids and back: plain bytes, or a `tokenizers` file."""

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lasp.data.errors import DataError


class Tokenizer(Protocol):
    """What the data and the generator need of a tokenizer."""

    name: str
    """Names the mapping: two tokenizers with the same name give the same ids."""
    vocab_size: int
    separator: int
    """The id written after every document."""

    def encode(self, text: bytes) -> np.ndarray:
        """Ids (int64, one-dimensional) of one document, without the separator."""
        ...

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Ids of one document whose text comes in pieces, in pieces; those that need all of the text join it."""
        ...

    def decode_stream(self) -> Callable[[int], str]:
        """A function that takes one id after the other and returns the text that became certain."""
        ...


class ByteTokenizer:
    """One token per byte; 256 is the document separator."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        return map(self.encode, blocks)

    def decode_stream(self) -> Callable[[int], str]:
        # A character may span several tokens: the incremental decoder holds back unfinished ones.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def decode(token: int) -> str:
            if token == self.separator:
                return decoder.decode(b"", final=True) + "\n\f\n"
            return decoder.decode(bytes([token]))

        return decode


class FileTokenizer:
    """A tokenizer saved by the `tokenizers` library (`tokenizer.json`).

    The separator is the file's own end-of-text token where it has one, else one id past its vocabulary.
    """

    END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"reading the tokenizer {path} needs the `tokenizers` package: pip install tokenizers, "
                "or use --data.tokenizer bytes"
            ) from error
        try:
            self.content = content = path.read_bytes()
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception on a bad file
            raise DataError(f"cannot read the tokenizer file {path}: {error}") from error
        self.name = f"file-{hashlib.sha256(content).hexdigest()}"
        size = self._tokenizer.get_vocab_size()
        known = [self._tokenizer.token_to_id(token) for token in self.END_OF_TEXT]
        self.separator: int = next((token for token in known if token is not None), size)
        self.vocab_size: int = max(size, self.separator + 1)

    def encode(self, text: bytes) -> np.ndarray:
        encoded = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=np.int64)

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        yield self.encode(b"".join(blocks))

    def decode_stream(self) -> Callable[[int], str]:
        tokens: list[int] = []
        printed = ""

        def decode(token: int) -> str:
            nonlocal printed
            if token == self.separator:
                tokens.clear()
                printed = ""
                return "\n\f\n"
            tokens.append(token)
            text = self._tokenizer.decode(tokens)
            if text.endswith("�"):  # an unfinished character
                return ""
            new, printed = text[len(printed) :], text
            if new.endswith("\n"):  # a line is final: keep the history, and so the cost per token, short
                tokens.clear()
                printed = ""
            return new

        return decode


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a `tokenizers` JSON file. Raises DataError."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not path.is_file():
        raise DataError(f"the tokenizer must be 'bytes' or a tokenizers JSON file; there is no file {name!r}")
    return FileTokenizer(path)
