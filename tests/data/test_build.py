"""`lasp data build`: the tokens of direct tokenising, from every kind of file, in constant memory; damage is seen."""

import dataclasses
import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from training_runs import small_config, write_text

from lasp.cli.main import main
from lasp.data.build import seal_digest, write_store
from lasp.data.documents import Document
from lasp.data.errors import DataError
from lasp.data.store import open_store, prepare
from lasp.data.tokenizer import ByteTokenizer
from lasp.train import loop

TEXTS = ["first document", "", "naïve — 漢字", "x", "a\nb"] + [f"number {i} " * (i % 7) for i in range(60)]


def built(source: Path, output: Path, *options: str) -> list[int]:
    """All tokens of what the command builds, train then validation."""
    assert main(["data", "build", "--path", str(source), "--output", str(output), *options]) == 0
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


def test_parquet(tmp_path: Path) -> None:
    """With pyarrow the tokens, without it what to install."""
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "a.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.touch()
        with pytest.raises(DataError, match=r"pip install 'lasp-torch\[parquet\]'"):
            prepare_folder(tmp_path / "rows", tmp_path / "cache")
        return
    parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=7)
    assert documents(built(tmp_path / "rows", tmp_path / "built")) == EXPECTED


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
        ('{"body": "x"}', r"a\.jsonl, record 2: no text in the field 'text' \(found: body\)"),
        ('{"text": 3}', r"record 2: no text in the field 'text'"),
        ("[1]", r"record 2: no text in the field 'text' \(found: list\)"),
        ('{"text": ', r"cannot read .*a\.jsonl at line 2"),
    ],
)
def test_a_bad_record_is_named_and_nothing_is_left(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path / "text", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


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


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose", "index", "ends", "swap"])
def test_damage_is_refused_with_the_file_named_and_code_65(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "built"
    built(write_text(tmp_path / "text"), data, "--shard-tokens", "4000")
    config = small_config(tmp_path)
    path = data / {"index": "index.json", "ends": "train.bounds.bin"}.get(damage, "train-00001.bin")
    content = bytearray(path.read_bytes())
    if damage in ("flip", "ends", "index"):
        content[len(content) // 2 & ~1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage == "lose":
        path.unlink()
    else:
        path.write_bytes((data / "train-00000.bin").read_bytes())
    assert main(["train", "--sp", "1", "--data.path", str(data), "--run-dir", str(tmp_path / "run")]) == 65
    said = capfd.readouterr().err
    assert path.name in said or (damage == "index" and str(data) in said)
    assert config.run_dir is not None and not config.run_dir.exists()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """Also where someone has sealed it."""
    data = tmp_path / "built"
    built(write_text(tmp_path / "text"), data)
    index = json.loads((data / "index.json").read_text())
    index["sealed"]["vocab_size"] = 120
    index["sha256"] = seal_digest(index["sealed"])
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
    assert loop.train(config).bits_per_byte == loop.train(moved).bits_per_byte


def test_the_target_must_be_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_jsonl(tmp_path / "records")
    assert main(["data", "build", "--path", str(tmp_path / "records"), "--output", str(tmp_path)]) == 65
    assert main(["data"]) == 64
