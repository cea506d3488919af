"""`lasp data build`: the tokens of direct tokenising, from every kind of file, in constant memory; damage is seen."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from training_runs import small_config, write_text

from lasp import files
from lasp.cli.main import main
from lasp.data.build import write_store
from lasp.data.documents import Document
from lasp.data.store import open_store, prepare
from lasp.data.tokenizer import ByteTokenizer
from lasp.errors import DataError
from lasp.train import trainer

TEXTS = ["first document", "", "naïve — 漢字", "x", "a\nb"] + [f"number {i} " * (i % 7) for i in range(60)]


def built(source: Path, output: Path, *options: str) -> list[int]:
    """All tokens of what the command builds, train then validation."""
    assert main(["data", "build", str(source), "--out", str(output), *options]) == 0
    store = open_store(output, verify=True)
    for stream, bounds in ((store.train, store.train_bounds), (store.validation, store.validation_bounds)):
        assert bounds[0] == 0 and np.flatnonzero(stream[:] == 256).tolist() == [*bounds[1:] - 1]
    return [*store.train[:].tolist(), *store.validation[:].tolist()]


def documents(tokens: list[int]) -> list[bytes]:
    """The documents of a stream, sorted: which side of the split they are on is another matter."""
    return sorted(bytes(part) for part in _split(tokens))


def _split(tokens: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == 256:
            parts.append([])
        else:
            parts[-1].append(token)
    assert parts.pop() == []
    return parts


EXPECTED = sorted(text.encode() for text in TEXTS if text)


def write_jsonl(folder: Path, key: str = "text") -> None:
    folder.mkdir()
    lines = "\n\n".join(json.dumps({"id": i, key: text}) for i, text in enumerate(TEXTS))
    half = lines.index("\n", len(lines) // 2) + 1
    (folder / "a.jsonl").write_text(lines[:half])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[half:].encode()))


def test_text_files_and_records_give_the_tokens_of_direct_tokenising(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "records", "body")
    (tmp_path / "files").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "files" / f"{number}.txt").write_bytes(text.encode())
    for kind, options in (("records", ["--field", "body", "--shard-tokens", "100"]), ("files", [])):
        output = tmp_path / f"{kind}-built"
        assert documents(built(tmp_path / kind, output, *options)) == EXPECTED
    assert len(list((tmp_path / "records-built").glob("train-*.bin"))) > 10
    again = tmp_path / "again"
    built(tmp_path / "records", again, "--field", "body")
    one, other = (open_store(folder, verify=True) for folder in (again, tmp_path / "records-built"))
    np.testing.assert_array_equal(one.train[:], other.train[:])  # however it is cut into files
    whole = one.train[:]
    for start, stop in ((0, 1), (99, 101), (100, 200), (150, 420), (250, 10_000), (300, 300)):
        np.testing.assert_array_equal(other.train[start:stop], whole[start:stop])
    assert len(one.validation) > 0


def test_sources_follow_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, records = write_text(tmp_path / "text"), tmp_path / "records"
    write_jsonl(records)
    built(text, tmp_path / "one", "--validation-fraction", "0.3")
    built(records / "a.jsonl", tmp_path / "two", "--validation-fraction", "0.3")
    arguments = ["data", "build", str(text), str(records / "a.jsonl"), "--out", str(tmp_path / "both")]
    assert main([*arguments, "--validation-fraction", "0.3"]) == 0
    one, two, both = (open_store(tmp_path / name, verify=True) for name in ("one", "two", "both"))
    for split in ("train", "validation"):
        first, second, whole = (getattr(store, split)[:] for store in (one, two, both))
        assert len(first) > 0 and len(second) > 0
        np.testing.assert_array_equal(np.concatenate([first, second]), whole)
        first, second, whole = (getattr(store, f"{split}_bounds") for store in (one, two, both))
        np.testing.assert_array_equal([*first, *(second[1:] + first[-1])], whole)
    said = capsys.readouterr().out
    assert f"lasp train --data.path {tmp_path / 'both'}" in said and "held out" not in said
    built(text / "part0" / "text0.txt", tmp_path / "single", "--validation-fraction", "1e-9")
    assert "1 document read, 0 empty, 0 skipped, 0 altered, 1 cut" in capsys.readouterr().out


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads tokens where pyarrow is, and says what to install where it is not."""
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "a.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.touch()
    else:
        parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=7)
        assert documents(built(tmp_path / "rows", tmp_path / "built")) == EXPECTED
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet needs the `pyarrow` package: pip install pyarrow"):
        prepare_folder(tmp_path / "rows", tmp_path / "cache")


def prepare_folder(folder: Path, cache: Path, field: str = "text") -> object:
    return prepare(
        folder=folder,
        suffixes=(".txt", ".jsonl", ".parquet"),
        field=field,
        tokenizer=ByteTokenizer(),
        validation_fraction=0.2,
        seed=0,
        cache=cache,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"/a\.jsonl, line 3: no field 'text' \(found: body\)"),
        ('{"text": 3}', r"line 3: the field 'text' is a number, not text"),
        ('{"text": null}', r"line 3: the field 'text' is null, not text"),
        ("[1]", r"line 3: no record with fields but a list"),
        ('{"text": ', r"line 3: no JSON"),
        ("[" * 100_000, r"line 3: no JSON"),
    ],
)
def test_a_bad_record_is_named_and_nothing_is_left_or_is_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "good"}\n\n' + line + '\n{"text": "more"}\n')
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path / "text", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    arguments = ["data", "build", str(tmp_path / "text"), "--out", str(tmp_path / "built"), "--on-bad-record", "skip"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 documents read, 0 empty, 1 skipped, 0 altered, 2 cut; first skipped: " in said
    assert re.search(message, said)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def peak(num_blocks: int) -> int:
        block = b"text " * 50_000
        texts = [Document("long", "train", (block for _ in range(num_blocks)))]
        tracemalloc.start()
        write_store(tmp_path / f"{num_blocks}", texts, ByteTokenizer())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(40) < 1.2 * peak(4) + 100_000


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose", "index", "ends", "lose-ends", "swap"])
def test_damage_is_refused_with_the_file_named_and_code_65(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "built"
    built(write_text(tmp_path / "text"), data, "--shard-tokens", "4000")
    config = small_config(tmp_path)
    path = data / ("index.json" if damage == "index" else "train-00001.bin")
    if damage.endswith("ends"):
        path = data / "train.bounds.bin"
    content = bytearray(path.read_bytes())
    if damage in ("flip", "ends", "index"):
        content[len(content) // 2 & ~1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage.startswith("lose"):
        path.unlink()
    else:
        path.write_bytes((data / "train-00000.bin").read_bytes())
    assert main(["train", "--sp", "1", "--data.path", str(data), "--run-dir", str(tmp_path / "run")]) == 65
    said = capfd.readouterr().err
    assert path.name in said
    assert config.run_dir is not None and not config.run_dir.exists()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """Refuses it even where someone has sealed it."""
    data = tmp_path / "built"
    built(write_text(tmp_path / "text"), data)
    index = json.loads((data / "index.json").read_text())
    index["sealed"]["vocab_size"] = 120
    index["sha256"] = files.json_sha256(index["sealed"])
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"train-00000\.bin has at offset \d+ the token id \d+, outside .* of 120"):
        open_store(data, verify=True)
    store = open_store(data, verify=False)
    with pytest.raises(DataError, match=r"train-00000\.bin has at offset"):
        store.train[:]


def test_training_on_built_data_is_training_on_its_text(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    text = config.data.path
    built(text, tmp_path / "built", "--validation-fraction", "0.2", "--suffixes", ".txt", "--shard-tokens", "1000")  # type: ignore[arg-type]
    moved = dataclasses.replace(
        config, run_dir=tmp_path / "other", data=dataclasses.replace(config.data, path=tmp_path / "built")
    )
    assert trainer.train(config).bits_per_byte == trainer.train(moved).bits_per_byte


def test_a_build_that_is_killed_leaves_nothing_that_loads(tmp_path: Path) -> None:
    """Killed as the operating system kills, with no chance to clear away."""
    target = tmp_path / "built"

    def texts(kill: bool) -> Iterator[Document]:
        yield Document("whole", "train", [b"one" * 100])
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Document("another", "validation", [b"two"])

    child = multiprocessing.get_context("fork").Process(
        target=lambda: write_store(target, texts(True), ByteTokenizer(), shard_tokens=50)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not target.exists()
    (remains,) = tmp_path.iterdir()
    assert len(list(remains.glob("train-*.bin"))) > 5
    with pytest.raises(DataError, match=r"index\.json"):
        open_store(remains, verify=False)
    write_store(target, texts(False), ByteTokenizer(), shard_tokens=50)
    assert len(open_store(target, verify=True).train) == 301


def test_the_target_is_new_and_stays_this_build_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, file = tmp_path / "records", tmp_path / "file"
    write_jsonl(records)
    file.touch()
    for out, message in ((tmp_path, "exists: name a new folder"), (file / "out", f"cannot build {file / 'out'}: ")):
        assert main(["data", "build", str(records), "--out", str(out)]) == 65
        assert message in capsys.readouterr().err
    assert main(["data"]) == 64
    assert main(["data", "build", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 65
    (tmp_path / "void.txt").touch()
    assert main(["data", "build", str(tmp_path / "void.txt"), "--out", str(tmp_path / "out")]) == 65
    assert "all documents are empty" in capsys.readouterr().err

    def overtaken(text: bytes) -> Iterator[Document]:
        """While it is read, another build puts its own store there."""
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_store(tmp_path / "out", [Document("other", "train", [b"the other's"])], ByteTokenizer())
        yield Document("mine", "train", [text])

    write_store(tmp_path / "out", overtaken(b"the other's"), ByteTokenizer())
    with pytest.raises(DataError, match="cannot build"):
        write_store(tmp_path / "out", overtaken(b"mine"), ByteTokenizer())
    assert bytes(open_store(tmp_path / "out", verify=True).train[:-1].tolist()) == b"the other's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "records", "void.txt"]
