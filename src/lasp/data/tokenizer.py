"""Text to token ids and back: plain bytes, or a `tokenizers` file."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lasp import files
from lasp.data.arguments import check
from lasp.errors import DataError

# A vocabulary of millions is tens of MB.
_MOST_BYTES = 1 << 30
TOKENIZER_FILE = "tokenizer.json"
"""A tokenizer's file beside what was made with it: token files, a checkpoint, an export."""

Decoder = Callable[[int | None], str]
"""Takes one id after the other and returns the text that became certain; None is the end of the ids."""

SEPARATOR_TEXT = "\n\f\n"
"""How a generated separator is shown."""


class Tokenizer(Protocol):
    """A tokenizer, as the data and the generator need it."""

    name: str
    """Names the mapping: two tokenizers with the same name give the same ids."""
    vocab_size: int
    separator: int
    """The id written after every document; no text becomes it."""
    num_altered: int
    """Texts encoded so far that their ids do not give back: not UTF-8, or with characters that it does not know."""
    content: bytes | None
    """What a file holds it, None for a tokenizer without one."""

    def encode(self, text: bytes) -> np.ndarray:
        """Ids (int64, one-dimensional) of one document, without the separator."""
        ...

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Ids of one document whose text comes in pieces, in pieces; those that need all of the text join it."""
        ...

    def decode_stream(self, before: Sequence[int] = ()) -> Decoder:
        """A decoder of what follows the ids `before`, whose text is not returned again."""
        ...


class ByteTokenizer:
    """One token per byte; 256 is the document separator."""

    name = "bytes"
    vocab_size = 257
    separator = 256
    num_altered = 0
    content: bytes | None = None

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        return map(self.encode, blocks)

    def decode_stream(self, before: Sequence[int] = ()) -> Decoder:
        # A character may span several tokens: the incremental decoder holds back unfinished ones.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def decode(token: int | None) -> str:
            if token is None or token == self.separator:
                return decoder.decode(b"", final=True) + ("" if token is None else SEPARATOR_TEXT)
            return decoder.decode(bytes([token]))

        return decode


class FileTokenizer:
    """A tokenizer saved by the `tokenizers` library (`tokenizer.json`), as a map of text to ids and nothing else.

    What the file may say beside, for the use it was saved for, is switched off: truncation, padding, dropout; and text
    that spells a special token stays text. The separator is the file's own special end-of-text token where it has one,
    else one id past all of its ids.
    """

    END_OF_TEXT = (
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<eos>",
        "<|eos|>",
        "[EOS]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[SEP]",
    )

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"reading the tokenizer {path} needs the `tokenizers` package: pip install tokenizers, "
                "or use --data.tokenizer bytes"
            ) from error
        try:
            content = files.read(path, _MOST_BYTES, follow=True)
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
            described = json.loads(content)
        except Exception as error:  # the library raises bare Exception on a bad file
            raise DataError(f"cannot read the tokenizer file {path}: {error}") from error
        self.content: bytes | None = content
        self.name = f"file-{hashlib.sha256(content).hexdigest()}"
        self._tokenizer: Any = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        for random in ("dropout", "nbest_size", "alpha"):  # ways to draw another encoding every time
            if getattr(tokenizer.model, random, None) is not None:
                setattr(tokenizer.model, random, None)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        end = max(ids.values(), default=-1) + 1  # there may be gaps: to count ids is not enough
        self.separator: int = next((special[name] for name in self.END_OF_TEXT if name in special), end)
        self.vocab_size: int = max(end, self.separator + 1)
        model = described["model"]
        unknown = ids.get(model.get("unk_token")) if "unk_token" in model else model.get("unk_id")
        self.num_altered = 0
        self._unknown = unknown
        self._special = np.asarray(sorted(set(special.values()) - {unknown}), dtype=np.int64)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        by_bytes = "ByteLevel" in json.dumps([described.get("pre_tokenizer"), described.get("normalizer")])
        # Whether the model leaves out characters that it has no id for.
        self._drops: bool = (
            model.get("type") == "BPE"
            and unknown is None
            and not model.get("byte_fallback")
            and not (by_bytes and ids.keys() >= set(alphabet))
        )

    def encode(self, text: bytes) -> np.ndarray:
        self._lossy = False
        try:
            characters = text.decode()
        except UnicodeDecodeError:
            characters, self._lossy = text.decode(errors="replace"), True
        ids = self._encode(characters)
        self.num_altered += self._lossy
        return ids

    def _encode(self, text: str) -> np.ndarray:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        if self._unknown is not None and (ids == self._unknown).any():
            self._lossy = True
        if self._drops and not self._lossy:
            covered = np.zeros(len(text) + 1, dtype=np.int64)
            for begin, end in encoded.offsets:
                covered[begin] += 1
                covered[end] -= 1
            gaps = np.flatnonzero(covered.cumsum()[:-1] == 0)
            self._lossy = any(not text[place].isspace() for place in gaps)
        spelled = np.flatnonzero(np.isin(ids, self._special))
        if len(spelled) == 0:
            return ids
        # A vocabulary may hold a special token as a piece of text too: apart, its letters are text again.
        cuts = [0]
        for begin, end in (encoded.offsets[place] for place in spelled):
            if end - begin < 2:
                raise DataError(f"the tokenizer takes {text[begin:end]!r} in the text for one of its special tokens")
            cuts.append(begin + 1)
        pieces = [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
        return np.concatenate([self._encode(piece) for piece in pieces])

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        yield self.encode(b"".join(blocks))

    def decode_stream(self, before: Sequence[int] = ()) -> Decoder:
        # What a token reads as may depend on those before it (a space in front, a character in parts), so a token is
        # decoded together with the ones printed last, and what those read as is taken off again.
        tokens: list[int] = []
        printed = 0
        for token in before:
            tokens = [] if token == self.separator else [*tokens[-_CONTEXT:], token]
        printed = len(tokens)

        def decode(token: int | None) -> str:
            nonlocal tokens, printed
            ends = token is None or token == self.separator
            if not ends:
                tokens.append(token)  # type: ignore[arg-type]
            known, text = self._tokenizer.decode(tokens[:printed]), self._tokenizer.decode(tokens)
            new = text[len(known) :]
            if ends:
                tokens, printed = [], 0
                return new + ("" if token is None else SEPARATOR_TEXT)
            if not new or new.endswith("\ufffd"):  # an unfinished character
                return ""
            tokens, printed = tokens[printed:], len(tokens) - printed
            return new

        return decode


# Ids before the first decoded one that are looked at.
_CONTEXT = 15


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a `tokenizers` JSON file. Raises DataError."""
    check("name", name, isinstance(name, str), "'bytes' or the path of a file, as a word")
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not path.is_file():
        raise DataError(f"the tokenizer must be 'bytes' or a tokenizers JSON file; there is no file {name!r}")
    return FileTokenizer(path)


def read_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The tokenizer called `name`, as `Tokenizer.name` gives it, of what was made with it and lies in `folder`.

    Raises DataError if its file is not there or is another one.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"{folder} was made with a tokenizer, and its file {TOKENIZER_FILE} is missing")
    tokenizer = FileTokenizer(path)
    if tokenizer.name != name:
        raise DataError(f"{path} is not the tokenizer that {folder} was made with: {tokenizer.name}, not {name}")
    return tokenizer


def files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files, by name, to write beside what was made with `tokenizer`, so that `read_tokenizer` finds it."""
    return {} if tokenizer.content is None else {TOKENIZER_FILE: tokenizer.content}
