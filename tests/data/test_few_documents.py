"""Text of few documents is divided within them; one's own held-out text is taken as it is."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from training_runs import small_config, write_text

from lasp.cli.main import main
from lasp.data.corpus import TextFile, unit_interval
from lasp.data.documents import documents_of
from lasp.data.store import TokenStore, prepare
from lasp.data.tokenizer import ByteTokenizer
from lasp.errors import DataError
from lasp.train import trainer


def prepared(folder: Path, cache: Path, **options: object) -> TokenStore:
    given: dict = {"suffixes": (".txt", ".jsonl"), "validation_fraction": 0.05, "seed": 0} | options
    return prepare(folder=folder, tokenizer=ByteTokenizer(), cache=cache, **given)


def parts(store: TokenStore, split: str) -> list[bytes]:
    stream, bounds = getattr(store, split), getattr(store, f"{split}_bounds")
    return [bytes(stream[start : end - 1].tolist()) for start, end in itertools.pairwise(bounds.tolist())]


@pytest.mark.parametrize(
    "text",
    [
        "line of words\n" * 400,
        "\u6f22\u5b57" * 2000,
        "no lines at all " * 300,
        "ab",
        '{"text": "' + "a word " * 90 + '"}',
    ],
    ids=["lines", "characters", "words", "two bytes", "record"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_are_cut_once(tmp_path: Path, text: str, count: int) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    ending = "jsonl" if text.startswith("{") else "txt"
    for number in range(count):
        (folder / f"{number}.{ending}").write_text(text)
    store = prepared(folder, tmp_path / "cache")
    train, validation = parts(store, "train"), parts(store, "validation")
    assert len(train) == len(validation) == count == store.reading.cut
    whole = text[10:-2] if ending == "jsonl" else text
    for first, second in zip(train, validation, strict=True):
        assert (first + second).decode() == whole and second.decode() and first.decode()
        assert len(second) <= max(0.05 * len(whole.encode()) + 1, 1)
        assert "\n" not in whole or first.endswith(b"\n")


def test_documents_that_hashes_divide_are_not_cut(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    store = prepared(text, tmp_path / "cache", validation_fraction=0.2)
    assert store.reading.cut == 0 and len(parts(store, "validation")) == store.num_documents["validation"] > 0
    files = [path.read_bytes() for path in text.rglob("*.txt")]
    assert sorted(parts(store, "train") + parts(store, "validation")) == sorted(files)


def test_of_many_documents_one_is_held_out_where_hashes_hold_none(tmp_path: Path) -> None:
    """40 files, all on one side by their hashes: the nearest one. Copies of few records: those of one text."""
    (tmp_path / "text").mkdir()
    names = [f"{number}.txt" for number in range(400)]
    for name in [name for name in names if unit_interval(f"split:{name}") > 0.05][:40]:
        (tmp_path / "text" / name).write_text(name * 100)
    store = prepared(tmp_path / "text", tmp_path / "cache")
    assert store.num_documents == {"train": 39, "validation": 1} and store.reading.cut == 0
    (tmp_path / "copies").mkdir()
    texts = [text for text in "abcdefgh" if unit_interval(f"text:{text}") > 0.05]
    (tmp_path / "copies" / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts * 9))
    store = prepared(tmp_path / "copies", tmp_path / "cache")
    assert len(set(parts(store, "validation"))) == 1 and store.num_documents["validation"] == 9
    assert not set(parts(store, "validation")) & set(parts(store, "train"))


def test_own_held_out_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("to train on " * 90)
    (tmp_path / "held.TXT").write_text("to validate on")
    store = prepared(tmp_path / "mine", tmp_path / "cache", validation_path=tmp_path / "held.TXT")
    assert parts(store, "validation") == [b"to validate on"] and parts(store, "train") == [b"to train on " * 90]
    again = prepared(tmp_path / "mine", tmp_path / "cache")
    assert again.key != store.key and again.reading.cut == 1
    arguments = ["data", "build", str(tmp_path / "mine"), "--out", str(tmp_path / "built")]
    assert main([*arguments, "--validation-path", str(tmp_path / "held.TXT")]) == 0
    with pytest.raises(DataError, match="give --validation-path to `lasp data build`"):
        prepared(tmp_path / "built", tmp_path / "cache", validation_path=tmp_path / "held.TXT")


def test_one_short_file_is_trained_on(tmp_path: Path) -> None:
    """A part is held out of it that is shorter than a sequence, and all of that is scored."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("all of it is one line of text. " * 30)
    config = small_config(tmp_path, steps=1)
    assert trainer.train(config).bits_per_byte is not None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    held_out = prepared(tmp_path / "text", config.data.cache, validation_fraction=0.2).validation
    assert f'"validation_tokens": {len(held_out) - 1}' in lines


def test_what_is_not_read_as_it_is_is_counted(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    (text / "upper.TXT").write_text("read like the others")
    (text / "empty.txt").touch()
    for name in ("picture.png", "notes.rst", "README"):
        (text / name).write_text("left out")
    (text / "lone.jsonl").write_text('{"text": "\\ud800 lone"}\n{"text": "a pair \\ud83d\\ude00"}\n{"text": ""}\n')
    store = prepared(text, tmp_path / "cache", validation_fraction=0.2)
    said = store.reading.summary()
    assert said.startswith("27 documents read, 2 empty, 0 skipped, 1 altered, 0 cut; 3 files left out by their endings")
    assert "(.png, .rst, none)" in said
    found = parts(store, "train") + parts(store, "validation")
    assert (
        "\ufffd lone".encode() in found and "a pair \U0001f600".encode() in found and b"read like the others" in found
    )
    assert prepared(text, tmp_path / "cache", validation_fraction=0.2).reading == store.reading  # kept by the index
    (text / "link.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read the text: .*link\.txt"):
        prepared(text, tmp_path / "cache")


@pytest.mark.parametrize("built", [True, False])
def test_what_was_verified_is_not_read_again(tmp_path: Path, built: bool) -> None:
    """Damage that keeps size and time shows that a file was not read; asked for all, it is."""
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    assert main(["data", "build", str(text), "--out", str(tmp_path / "built"), "--validation-fraction", "0.2"]) == 0
    folder = tmp_path / "built" if built else text
    file = folder / ("train-00000.bin" if built else "part0/text0.txt")
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))  # long ago

    def opened(verify: str) -> str:
        return prepared(folder, cache, validation_fraction=0.2, verify=verify).key

    key = opened("changed")
    content = bytearray(file.read_bytes())
    content[6] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(10**18, 10**18))
    assert opened("changed") == key
    if built:
        with pytest.raises(DataError, match=r"train-00000\.bin does not match"):
            opened("full")
        os.utime(file, ns=(10**18, 2 * 10**18))
        with pytest.raises(DataError, match=r"train-00000\.bin does not match"):
            opened("changed")
    else:
        assert opened("full") != key
        os.utime(file, ns=(10**18, 10**18 + 1))
        assert opened("changed") != key


def test_a_file_changed_just_now_is_read_again(tmp_path: Path) -> None:
    """The time of its change may stay the same when it is changed once more."""
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    first = prepared(text, cache).key
    file = text / "part0" / "text0.txt"
    status = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepared(text, cache).key != first


def test_a_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    (document,) = documents_of(TextFile("a.txt", path), "text", 1e-9)
    assert document.split == "train" and np.sum([len(block) for block in document.blocks]) == 100


def test_a_document_cut_in_two_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "two.jsonl").write_text('{"text": "\\ud800 lone and long"}\n{"text": "as it is written"}\n')
    said = prepared(tmp_path / "text", tmp_path / "cache").reading.summary()
    assert said == "2 documents read, 0 empty, 0 skipped, 1 altered, 2 cut"
