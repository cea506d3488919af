"""A checkpoint is whole or it is refused: no flip, cut or kill at any moment loads wrong numbers."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lasp.train import checkpoint
from lasp.train.errors import CheckpointError

CONFIG = {"width": 5, "kind": "toy"}


def toy() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def write(root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 2) -> Path:
    state = {"step": step, "model_config": CONFIG}
    return checkpoint.save(root, model=model, optimizer=optimizer, state=state, keep=keep)


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    model, optimizer = toy()
    write(tmp_path, 3, model, optimizer)
    expected_random = torch.rand(3)
    other, other_optimizer = toy()
    found = checkpoint.find(tmp_path, report=pytest.fail)
    assert found.state["step"] == 3
    checkpoint.load_model(found, other, CONFIG)
    checkpoint.load_optimizer(found, other, other_optimizer)
    assert torch.equal(torch.rand(3), expected_random)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for kind, tensor in optimizer.state[ours].items():
            assert torch.equal(tensor, other_optimizer.state[theirs][kind])


def test_no_flipped_bit_and_no_cut_is_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, *toy())
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(good) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    source = random.Random(1)
    refused = 0
    for name, data in good.items():
        for _ in range(60):
            damaged = bytearray(data)
            place = source.randrange(len(data))
            damaged[place] ^= 1 << source.randrange(8)
            (folder / name).write_bytes(damaged)
            refused += is_refused(folder)
            (folder / name).write_bytes(data[:place])
            refused += is_refused(folder)
        (folder / name).unlink()
        refused += is_refused(folder)
        (folder / name).write_bytes(data)
    assert refused == 4 * 121
    assert not is_refused(folder)


def is_refused(folder: Path) -> bool:
    try:
        checkpoint.verify(folder)
    except CheckpointError:
        return True
    return False


def test_the_newest_good_one_is_taken_and_the_damaged_one_named(tmp_path: Path) -> None:
    model, optimizer = toy()
    older, newer = write(tmp_path, 9, model, optimizer), write(tmp_path, 10, model, optimizer)
    assert checkpoint.find(tmp_path, report=pytest.fail).folder == newer
    data = bytearray((newer / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newer / "model.safetensors").write_bytes(data)
    said: list[str] = []
    assert checkpoint.find(tmp_path, report=said.append).folder == older
    assert "step-00000010/model.safetensors does not match its SHA-256" in said[0] and str(older) in said[1]
    with pytest.raises(CheckpointError, match="does not match"):  # asked for by name: no exchange
        checkpoint.find(newer, report=said.append)
    (older / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is usable"):
        checkpoint.find(tmp_path, report=said.append)


@pytest.mark.parametrize("call", ["save_file", "_sync", "rename"])
def test_killed_at_any_call_the_old_or_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A real process is killed at the n-th storage call, for every n, while it saves step 2 a second time."""
    model, optimizer = toy()
    write(tmp_path / "start", 1, model, optimizer)
    write(tmp_path / "start", 2, model, optimizer)
    owner = os if call == "rename" else checkpoint
    original = getattr(owner, call)
    torch.set_num_threads(1)
    outcomes = set()
    for fatal in range(1, 20):
        root = tmp_path / f"{call}{fatal}"
        shutil.copytree(tmp_path / "start", root)
        child = os.fork()
        if child == 0:
            calls = 0

            def dies(*arguments: object) -> object:
                nonlocal calls
                calls += 1
                if calls == fatal:  # noqa: B023 - the child never sees the next round
                    os.kill(os.getpid(), 9)
                return original(*arguments)

            setattr(owner, call, dies)
            write(root, 2, model, optimizer)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = checkpoint.find(root, report=pytest.fail)
        outcomes.add((found.state["step"], status))
        write(root, 3, model, optimizer)
        left = sorted(path.name for path in root.iterdir())
        assert left[-1] == "step-00000003" and not any(name.startswith(".") for name in left)
        if status == 0:
            break
    assert (2, 0) in outcomes and any(status == 9 for _, status in outcomes)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = toy()
    for step in (1, 2, 3, 10):
        write(tmp_path, step, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_a_history_written_anew_replaces_the_damaged_future(tmp_path: Path) -> None:
    model, optimizer = toy()
    for step in (3, 4, 5, 6):
        write(tmp_path, step, model, optimizer, keep=4)
    for step in (5, 6):
        (tmp_path / f"step-0000000{step}" / "state.json").write_text("{}")
    assert checkpoint.find(tmp_path, report=lambda _: None).state["step"] == 4
    write(tmp_path, 4, model, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, 1, *toy())
    found = checkpoint.find(tmp_path, report=pytest.fail)
    with pytest.raises(CheckpointError, match=r"checkpoint -> now:\n  width: 5 -> 6"):
        checkpoint.load_model(found, toy()[0], {**CONFIG, "width": 6})
    with pytest.raises(CheckpointError, match="holds other tensors"):
        checkpoint.load_model(found, nn.Linear(3, 5), CONFIG)
