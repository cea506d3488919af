"""The token file: deterministic, rebuilt when the text changes, never trusted when it is damaged."""

import random
import sys
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pytest
from training_runs import write_text

from lasp.data import build as building
from lasp.data.blocks import BLOCK_BYTES
from lasp.data.corpus import find_files
from lasp.data.documents import Document, documents_of
from lasp.data.store import TokenStore, open_store, prepare
from lasp.data.tokenizer import ByteTokenizer, load_tokenizer
from lasp.errors import DataError


def build(folder: Path, cache: Path, **changes: object) -> TokenStore:
    options: dict = {
        "suffixes": (".txt",),
        "field": "text",
        "validation_fraction": 0.2,
        "seed": 0,
    } | changes
    return prepare(folder=folder, tokenizer=ByteTokenizer(), cache=cache, **options)


def test_documents_are_whole_in_order_and_separated(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text")
    (folder / "empty.txt").touch()
    (folder / ".hidden.txt").write_text("never read")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    store = build(folder, tmp_path / "cache")
    documents = [d for file in find_files(folder, (".txt",), 0) for d in documents_of(file, "text", 0.2)]
    assert {document.split for document in documents} == {"train", "validation"}
    for split, stream in (("train", store.train), ("validation", store.validation)):
        texts = [(folder / document.name).read_bytes() for document in documents if document.split == split]
        expected = [token for text in texts if text for token in (*text, 256)]  # an empty one adds nothing
        assert stream[:].tolist() == expected
        bounds = store.train_bounds if split == "train" else store.validation_bounds
        assert bounds.tolist() == [0, *np.cumsum([len(text) + 1 for text in texts if text]).tolist()]
    assert sum(store.num_documents.values()) == 24


def test_the_split_does_not_move_when_a_file_is_added(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")

    def splits(seed: int) -> dict[str, str]:
        files = find_files(text, (".txt",), seed)
        return {document.name: document.split for file in files for document in documents_of(file, "text", 0.2)}

    before = splits(0)
    (text / "new.txt").write_text("more")
    assert before.items() < splits(1).items()


def test_a_store_is_built_once_and_again_when_the_text_changes(tmp_path: Path) -> None:
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    first = build(text, cache)
    built_at = (first.folder / "train-00000.bin").stat().st_mtime_ns
    assert (build(text, cache).folder / "train-00000.bin").stat().st_mtime_ns == built_at
    file = text / "part0" / "text0.txt"
    file.write_bytes(file.read_bytes()[::-1])  # same size
    changed = build(text, cache)
    assert changed.key != first.key and changed.folder != first.folder
    assert build(text, cache, seed=1).key != changed.key


@pytest.mark.parametrize("part", ["train", "train_bounds"])
def test_what_changes_after_the_start_is_not_used(tmp_path: Path, part: str) -> None:
    """A flipped bit or a file cut short, in a store that is open, whose first numbers have been read."""
    text = write_text(tmp_path / "text", num_files=600)
    built = build(text, tmp_path / "cache")
    if part == "train_bounds":  # enough of them for several blocks
        documents = (Document(f"{n}", "train", [b"a"]) for n in range(30_000))
        building.write_store(tmp_path / "many", documents, ByteTokenizer())
        built = open_store(tmp_path / "many", verify=True)
    numbers = getattr(built, part)
    expected, path = numbers[:].copy(), numbers.path if part != "train" else numbers.files[0].path
    good, source = path.read_bytes(), random.Random(1)
    assert len(good) > 3 * BLOCK_BYTES
    refused = 0
    for number in range(100):
        opened = getattr(open_store(built.folder, verify=False), part)
        np.testing.assert_array_equal(opened[:64], expected[:64])
        place = source.randrange(BLOCK_BYTES, len(good))
        with open(path, "r+b") as stream:
            if number % 10 == 0:
                stream.truncate(place)
            else:
                stream.seek(place)
                stream.write(bytes([good[place] ^ 1 << source.randrange(8)]))
        with pytest.raises(DataError, match=f"{path.name} has changed since it was built, in bytes"):
            opened[:]
        refused += 1
        np.testing.assert_array_equal(opened[:64], expected[:64])
        path.write_bytes(good)
    assert refused == 100
    np.testing.assert_array_equal(getattr(open_store(built.folder, verify=False), part)[:], expected)


def test_windows_are_those_of_the_whole(tmp_path: Path) -> None:
    """Across blocks and shards, and single numbers as a search asks for them."""
    documents = [Document(f"{n}", "train", [b"abcdefg" * 100]) for n in range(200)]
    building.write_store(tmp_path / "store", iter(documents), ByteTokenizer(), shard_tokens=50_001)
    store = open_store(tmp_path / "store", verify=True)
    tokens, source = store.train[:], random.Random(2)
    assert len(tokens) == 200 * 701 and len(store.train.files) == 3
    for _ in range(50):
        start, stop = sorted(source.sample(range(len(tokens) + 1), 2))
        np.testing.assert_array_equal(store.train[start:stop], tokens[start:stop])
    bounds = store.train_bounds
    assert bounds[:].tolist() == bounds.tolist() == [701 * n for n in range(201)]
    assert [bounds[0], bounds[-1], bisect_right(bounds, 700), bisect_right(bounds, 701)] == [0, len(tokens), 1, 2]


@pytest.mark.parametrize("damage", ["flip", "truncate", "index"])
def test_a_damaged_store_is_refused_and_rebuilt(tmp_path: Path, damage: str) -> None:
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    store = build(text, cache)
    expected = store.train[:]
    path = store.folder / ("index.json" if damage == "index" else "train-00000.bin")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data[: len(data) // 2] if damage != "flip" else data)
    with pytest.raises(DataError):
        open_store(store.folder, verify=True)
    np.testing.assert_array_equal(build(text, cache).train[:], expected)


def test_a_build_that_dies_leaves_nothing_to_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building.os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            build(text, cache)
    assert list(cache.iterdir()) == []
    assert len(build(text, cache).train) > 0


def test_unusable_text_and_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        build(tmp_path / "nowhere", tmp_path)
    (tmp_path / "notes.rst").write_text("text")
    with pytest.raises(DataError, match=r"ends in \.txt \(found: \.rst\)"):
        build(tmp_path, tmp_path / "cache")
    with pytest.raises(DataError, match="'bytes' or a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_the_standard_library_is_text_enough() -> None:
    names = {file.name for file in find_files(None, (), 0)}
    assert "argparse.py" in names and len(names) > 300
    assert not any(set(Path(name).parts[:-1]) & {"test", "tests", "site-packages"} for name in names)


def test_bytes_decode_across_tokens() -> None:
    tokenizer = ByteTokenizer()
    decode = tokenizer.decode_stream()
    text = "naïve — 漢字\n"
    assert "".join(decode(int(token)) for token in tokenizer.encode(text.encode())) == text


def test_a_missing_tokenizers_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        load_tokenizer(str(file))
