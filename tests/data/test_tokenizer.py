"""A tokenizer file is a map of text to ids: whatever it was saved with, nothing is cut, filled or taken for a token."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
import tokenizers

from lasp.data.tokenizer import FileTokenizer, Tokenizer, files_of, read_tokenizer
from lasp.errors import DataError

TEXT = "hello world. <|endoftext|> </s><pad> <user> <|im_start|>" + " hello red world end." * 9


@pytest.fixture(params=list(tokenizer_files.KINDS))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tokenizer_files.KINDS[request.param](tmp_path / "tokenizer.json")


def streamed(tokenizer: Tokenizer, ids: list[int], before: list[int]) -> str:
    decode = tokenizer.decode_stream(before)
    return "".join([*map(decode, ids), decode(None)])


def test_text_comes_back_whole(file: Path) -> None:
    """Text that spells special tokens comes back, too; with the file as it is saved, some of it does not."""
    tokenizer = FileTokenizer(file)
    ids = tokenizer.encode(TEXT.encode())
    np.testing.assert_array_equal(tokenizer.encode(TEXT.encode()), ids)  # nothing is drawn at random
    added = json.loads(file.read_text())["added_tokens"]
    special = {token["id"] for token in added} | {tokenizer.separator}
    assert not special & set(ids.tolist()) and ids.max() < tokenizer.vocab_size
    half = len(ids) // 2
    told, first = streamed(tokenizer, ids.tolist(), []), streamed(tokenizer, ids[:half].tolist(), [])
    # A piece that spells a token is read in two, and some models begin each reading with a space.
    assert told.replace(" ", "") == TEXT.replace(" ", "") and tokenizer.num_altered == 0
    assert first + streamed(tokenizer, ids[half:].tolist(), ids[:half].tolist()) == told
    described = json.loads(file.read_text()) | {"added_tokens": [], "truncation": None, "padding": None}
    described["model"] |= {"dropout": None} if "dropout" in described["model"] else {}
    plain = tokenizers.Tokenizer.from_str(json.dumps(described)).encode(TEXT, add_special_tokens=False).ids
    assert plain == ids.tolist() or special & set(plain)  # the model alone, where that has no token as a piece of text
    saved = tokenizers.Tokenizer.from_file(str(file))
    found = saved.encode(TEXT, add_special_tokens=False).ids
    assert len(found) < len(ids) and (len(found) <= 16 or special & set(found))


def test_separators_are_the_file_s_own_or_outside_its_ids(tmp_path: Path) -> None:
    for kind, own in (("byte-level", "<|endoftext|>"), ("pieces", "</s>"), ("gaps", None)):
        tokenizer = FileTokenizer(tokenizer_files.KINDS[kind](tmp_path / kind))
        ids = tokenizers.Tokenizer.from_file(str(tmp_path / kind)).get_vocab()
        assert tokenizer.separator == (max(ids.values()) + 1 if own is None else ids[own])
        assert tokenizer.vocab_size == max(*ids.values(), tokenizer.separator) + 1
        if own is None:
            assert tokenizer.separator > len(ids)  # their number is an id of a letter's, or may be


def test_a_stream_reads_on_from_what_came_before(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(tokenizer_files.pieces(tmp_path / "t"))
    hello, world = tokenizer.encode(b"hello world").tolist()
    assert streamed(tokenizer, [world], [hello]) == " world"
    assert streamed(tokenizer, [hello, world, tokenizer.separator, world], []) == "hello world\n\f\nworld"
    assert streamed(tokenizer, [world], []) == "world"  # the control: alone it loses its space
    by_bytes = FileTokenizer(tokenizer_files.byte_level(tmp_path / "b"))
    decode = by_bytes.decode_stream()
    told = [decode(int(token)) for token in by_bytes.encode("\u6f22".encode())]
    assert told == ["", "", "\u6f22"]


def test_text_that_ids_do_not_give_back_is_counted(tmp_path: Path) -> None:
    for kind, text in (("byte-level", b"caf\xe9"), ("pieces", "\u6f22".encode()), ("gaps", "h\u00e9llo".encode())):
        tokenizer = FileTokenizer(tokenizer_files.KINDS[kind](tmp_path / kind))
        tokenizer.encode(b"hello world")
        assert tokenizer.num_altered == 0
        tokenizer.encode(text)
        assert tokenizer.num_altered == 1


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(tokenizer_files.pieces(tmp_path / "t"))
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tmp_path, tokenizer.name)
    for name, content in files_of(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    assert read_tokenizer(tmp_path, tokenizer.name).name == tokenizer.name
    tokenizer_files.gaps(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="is not the tokenizer that"):
        read_tokenizer(tmp_path, tokenizer.name)
