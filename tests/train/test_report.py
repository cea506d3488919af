"""The page about a run: whole, self-contained, true to the metrics, and deaf to what hostile text says."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
import world
from training_runs import small_config

from lasp.cli import main as cli
from lasp.train import trainer
from lasp.train.logging.metrics import curve_of, read_metrics
from lasp.train.report import load, page, render
from lasp.train.report.chart import ticks

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m "&\u202e'


class Page(HTMLParser):
    """Elements with their attributes, and text by the element it is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def within(self, tag: str) -> str:
        return "".join(text for element, text in self.texts if element == tag)

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for tag, attributes in self.elements if tag == "section"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two by two processes."""
    place = tmp_path_factory.mktemp("report")
    config = small_config(place, dp=2, sp=2, steps=6, log_every=3, eval_every=3)
    world.run(4, lambda _rank: trainer.train(config) and None)
    (place / "run" / "sample.txt").write_text("def f(x)")
    return place / "run"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def alarms(text: str) -> list[str]:
    """Things that could run or load something: handlers, addresses, scripts beyond the page's own."""
    found = [f"<{tag} {name}>" for tag, attributes in Page(text).elements for name in attributes if name[:2] == "on"]
    found += [tag for tag, _ in Page(text).elements if tag in ("img", "iframe", "link", "object", "embed", "base")]
    found += [
        f"<{tag} {name}={value}>"
        for tag, attributes in Page(text).elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "srcset")
    ]
    found += ["script"] * (sum(tag == "script" for tag, _ in Page(text).elements) - 1)
    return found + re.findall(r"@import|url\((?!#)[^)]*\)|https?://|\x1b|\u202e", text)


def test_every_section_is_there_and_nothing_is_loaded(folder: Path) -> None:
    text = render(load(folder))
    parsed = Page(text)
    assert tuple(parsed.ids()) == page.SECTIONS and not parsed.open
    assert not alarms(text)
    (policy,) = (a["content"] for tag, a in parsed.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(parsed.within("script").encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "prefers-color-scheme: dark" in text
    said = parsed.within("text") + parsed.within("tspan")
    assert all(part in said for part in ("rank 3", "tokens 32–63", "sequences 3–4", "summed over 4 ranks"))  # noqa: RUF001


def test_curves_are_the_metrics(folder: Path) -> None:
    lines = read_metrics(folder / "metrics.jsonl")
    parsed = Page(render(load(folder)))
    curves = {
        series["n"]: series["y"]
        for tag, attributes in parsed.elements
        if tag == "figure"
        for series in json.loads(attributes["data-series"] or "")
    }
    assert [line["lr"] for line in lines if "loss" in line] == pytest.approx(curves["learning rate"], rel=1e-4)
    bits = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line]
    assert curves["held-out text"] == pytest.approx(bits, rel=1e-4)
    own = [line["ranks"]["own_s"][2] * 1e3 for line in lines if "ranks" in line]
    assert curves["rank 2"] == pytest.approx(own, rel=1e-4)
    assert f"{bits[-1]:.3f}" in parsed.within("b")


@pytest.mark.parametrize(("tokenizer", "by_byte"), [("bytes", True), ("words.json", False)])
def test_bits_of_a_byte_and_of_a_token_never_share_an_axis(copied: Path, tokenizer: str, by_byte: bool) -> None:
    about = json.loads((copied / "run.json").read_text())
    about["text"]["tokenizer"] = tokenizer
    (copied / "run.json").write_text(json.dumps(about))
    figures = [
        {series["n"] for series in json.loads(attributes["data-series"] or "")}
        for tag, attributes in Page(render(load(copied))).elements
        if tag == "figure"
    ]
    assert sum("held-out text" in names for names in figures) == 1
    assert any({"training, smoothed", "held-out text"} <= names for names in figures) == by_byte
    # And so in the picture that a run leaves.
    lines = read_metrics(copied / "metrics.jsonl")
    drawn = [
        (axes.get_ylabel(), {line.get_label() for line in axes.lines})
        for axes in curve_of(lines, by_byte=by_byte, trigram=2.5).axes
    ]
    units = {label: unit for unit, labels in drawn for label in labels}
    assert units["validation"] == units["byte 3-gram, validation"] == "bits per byte"
    assert units["training, smoothed over 20 steps"] == ("bits per byte" if by_byte else "bits per token")


def test_charts_can_be_read_on_a_telephone(folder: Path) -> None:
    """Text of 11 units is 9 px or more on a page of 390 px, where a chart is 320 px wide."""
    parsed, kinds = Page(render(load(folder))), {"broad": 0, "narrow": 0}
    for tag, attributes in parsed.elements:
        if tag == "svg" and attributes["class"] in kinds:
            kinds[str(attributes["class"])] += 1
            width = float(str(attributes["viewbox"]).split()[2])
            assert attributes["class"] == "broad" or 11 * 320 / width >= 9
    figures = sum(tag == "figure" for tag, _ in parsed.elements)
    assert kinds == {"broad": figures, "narrow": figures}


def test_hostile_text_stays_text(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "sample.txt").write_text("def f(x)" + HOSTILE)
    config, about = (json.loads((copied / name).read_text()) for name in ("config.json", "run.json"))
    config["data"]["tokenizer"] = config["run_dir"] = about["text"]["source"] = HOSTILE
    about["layout"]["exchange"] = about["versions"]["torch"] = about["device"]["name"] = HOSTILE
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "run.json").write_text(json.dumps(about))
    text = render(load(copied))
    assert not alarms(text) and "␛[31mred" in text
    shown = HOSTILE.replace("\x1b", "␛").replace("\u202e", "�")
    assert shown in Page(text).within("pre") and shown in Page(text).within("tspan")
    # The control: without escaping the same text is seen to do harm.
    monkeypatch.setattr(page, "escape", str)
    with pytest.raises(AssertionError):
        assert not alarms(render(load(copied)))


def test_a_run_that_goes_on_has_a_page(copied: Path) -> None:
    metrics = copied / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + '\n{"step": 2, "lo')
    text = render(load(copied))
    assert "1 of 6 steps" in text and not alarms(text)


def test_the_command_writes_the_page(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(copied)]) == 0
    assert Path(capsys.readouterr().out.strip()) == copied / "report.html"
    assert cli.main(["report", str(copied), "--out", str(tmp_path / "there.html")]) == 0
    assert (tmp_path / "there.html").read_text() == (copied / "report.html").read_text()
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "there.html")]) == 64
    assert cli.main(["report", str(tmp_path)]) == 64
    assert "is not a run folder" in capsys.readouterr().err
    damaged = "holds files that are damaged, or of another version"
    for name, damage, said in (
        ("run.json", "[" * 100_000, "run.json: JSON nested too deeply"),
        ("run.json", "{", "run.json: Expecting property name"),
        ("config.json", "[]", damaged),
        ("metrics.jsonl", '{"step": 1, "loss": "a"}\n', damaged),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}', "no step has finished yet"),  # a crash cut the line short
    ):
        kept = (copied / name).read_text()
        (copied / name).write_text(damage)
        assert cli.main(["report", str(copied)]) == 64
        assert said in capsys.readouterr().err
        (copied / name).write_text(kept)
    # Where it was asked for: a pipe stays one, and a link leads where it led.
    pipe, link = tmp_path / "pipe", tmp_path / "link.html"
    os.mkfifo(pipe)
    link.symlink_to("there.html")
    with ThreadPoolExecutor(1) as reader:
        received = reader.submit(pipe.read_text)
        assert cli.main(["report", str(copied), "--out", str(pipe)]) == 0
        assert received.result(10).startswith("<!doctype html>") and pipe.is_fifo()
    (tmp_path / "there.html").unlink()
    assert cli.main(["report", str(copied), "--out", str(link)]) == 0
    assert link.is_symlink() and (tmp_path / "there.html").is_file()


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (2.31, 8.02), (-5.0, 5.0), (0.0, 3e-4), (1e6, 4.2e6)):
        found = ticks(low, high, 5)
        assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high
        step = found[1] - found[0]
        assert math.isclose(
            step / 10 ** math.floor(math.log10(step * 1.0001)),
            round(step / 10 ** math.floor(math.log10(step * 1.0001)), 1),
            rel_tol=1e-6,
        )
