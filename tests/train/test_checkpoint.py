"""A checkpoint is whole or it is refused: no flip, cut or kill at any moment loads wrong numbers."""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import world
from torch import nn
from training_runs import small_config

from lasp import files
from lasp.cli import main as cli
from lasp.data.batches import Shard
from lasp.distributed.comm import Comm
from lasp.distributed.groups import new_group
from lasp.errors import CheckpointError
from lasp.train import checkpoint, trainer
from lasp.train.checkpoint import shards
from lasp.train.progress import Progress
from lasp.train.world import World

CONFIG = {"width": 5, "kind": "toy"}


def toy() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


ALONE = World(0, 1, torch.device("cpu"), Shard())


def try_to_write(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 2, among: World = ALONE
) -> str | None:
    """Save, and wait; the problem, if there is one."""
    saver = shards.Saver(root, among, keep=keep)
    return saver.start(model, optimizer, {"step": step, "model_config": CONFIG, "layout": {}}) or saver.finish()


def write(root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 2) -> Path:
    assert try_to_write(root, step, model, optimizer, keep) is None
    return root / f"step-{step:08d}"


def shard_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    model, optimizer = toy()
    write(tmp_path, 3, model, optimizer)
    expected_random = torch.rand(3)
    other, other_optimizer = toy()
    found = checkpoint.find(tmp_path, report=pytest.fail)
    assert found.state["step"] == 3
    shards.load(found, other, CONFIG, optimizer=other_optimizer)
    assert torch.equal(torch.rand(3), expected_random)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for kind, tensor in optimizer.state[ours].items():
            assert torch.equal(tensor, other_optimizer.state[theirs][kind])


def test_no_flipped_bit_and_no_cut_is_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, *toy())
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(good) == ["manifest.json", shard_of(folder).name, "state.json"]
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
    assert refused == 3 * 121
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
    data = bytearray(shard_of(newer).read_bytes())
    data[-1] ^= 1
    shard_of(newer).write_bytes(data)
    said: list[str] = []
    assert checkpoint.find(tmp_path, report=said.append).folder == older
    assert f"step-00000010/{shard_of(newer).name} does not match its SHA-256" in said[0] and str(older) in said[1]
    with pytest.raises(CheckpointError, match="does not match"):  # asked for by name: no exchange
        checkpoint.find(newer, report=said.append)
    (older / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is usable"):
        checkpoint.find(tmp_path, report=said.append)


# Where a save touches the disk, and how often at least. The last two are within a folder that is thrown away.
STORAGE_CALLS = {"mkdir": 1, "open": 4, "fsync": 5, "rename": 2, "rmdir": 1, "unlink": 3}


@pytest.mark.parametrize("call", STORAGE_CALLS)
def test_killed_at_any_storage_call_the_old_or_the_new_one_stands(tmp_path: Path, call: str) -> None:
    """A real process is killed before its n-th call, for every n, while it saves step 2 a second time."""
    model, optimizer = toy()
    write(tmp_path / "start", 1, model, optimizer)
    write(tmp_path / "start", 2, model, optimizer)
    original = getattr(os, call)
    torch.set_num_threads(1)
    kills = 0
    for fatal in range(1, 30):
        root = tmp_path / f"{call}{fatal}"
        shutil.copytree(tmp_path / "start", root)
        child = os.fork()
        if child == 0:
            calls = 0

            def dies(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == fatal:  # noqa: B023 - the child never sees the next round
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(os, call, dies)
            of_paths = getattr(pathlib, "_NormalAccessor", None)  # to which Python 3.10 has copied some
            if getattr(of_paths, call, None) is original:
                setattr(of_paths, call, staticmethod(dies))
            os._exit(0 if try_to_write(root, 2, model, optimizer) is None else 1)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        found = checkpoint.find(root, report=pytest.fail)
        assert found.state["step"] == 2  # the one that was, or the one that is
        shards.load(found, toy()[0], CONFIG)
        write(root, 3, model, optimizer)
        left = sorted(path.name for path in root.iterdir())
        assert left[-1] == "step-00000003" and not any(name.startswith(".") for name in left)
        if status == 0:
            break
        kills += 1
    assert kills >= STORAGE_CALLS[call] and status == 0


def test_a_full_disk_keeps_the_old_one_and_is_told(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes past a limit; a file is then there in part."""
    model, optimizer = toy()
    older = write(tmp_path, 1, model, optimizer)

    def full(_rank: int) -> tuple[str | None, str | None]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
        problem = try_to_write(tmp_path, 2, model, optimizer)
        left = [path.name for path in tmp_path.iterdir()]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert left == [older.name] and checkpoint.find(tmp_path, report=pytest.fail).folder == older
        return problem, try_to_write(tmp_path, 3, model, optimizer)

    (problem, again), *_ = world.run(1, full)
    assert problem is not None and "the checkpoint of step 2 could not be written: rank 0: OSError" in problem
    assert again is None


def test_one_process_that_cannot_write_is_told_by_all(tmp_path: Path) -> None:
    model, optimizer = toy()
    write(tmp_path, 1, model, optimizer)

    def problems(rank: int) -> list[str | None]:
        everyone = World(rank, 2, torch.device("cpu"), Shard(), control=Comm(new_group(), 30), files=new_group())
        original = checkpoint.seal_file

        def refuses(path: Path, progress: Progress) -> checkpoint.FileSeal:
            raise OSError(errno.EIO, "Input/output error")

        if rank == 1:
            checkpoint.sealed.seal_file = refuses
        found = [try_to_write(tmp_path, 2, model, optimizer, among=everyone)]
        assert checkpoint.find(tmp_path, report=pytest.fail, world=everyone).state["step"] == 1
        checkpoint.sealed.seal_file = original
        found.append(try_to_write(tmp_path, 3, model, optimizer, among=everyone))
        damaged = max(tmp_path.glob("step-00000003/*.safetensors"), key=lambda path: path.name)
        dist.barrier()
        if rank == 0:
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        dist.barrier()
        said: list[str] = []
        assert checkpoint.find(tmp_path, report=said.append, world=everyone).state["step"] == 1
        return [*found, said[0].split(": ", 1)[1].replace(" (read by rank 1)", "").split(" does not match")[0]]

    for first, second, named in world.run(2, problems):
        assert first == "the checkpoint of step 2 could not be written: rank 1: OSError(5, 'Input/output error')"
        assert second is None and named.endswith(".safetensors")


def test_training_goes_on_where_a_checkpoint_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, sp=1, save_every=4)
    original = checkpoint.seal_file

    def at_step_four(path: Path, progress: Progress) -> checkpoint.FileSeal:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, progress)

    monkeypatch.setattr(checkpoint.sealed, "seal_file", at_step_four)
    assert trainer.train(config).finished_steps == 12
    assert config.run_dir is not None
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]
    said = capfd.readouterr().out
    assert said.count("No space left on device") == 1 and "training goes on" in said
    monkeypatch.setattr(
        checkpoint.sealed, "seal_file", lambda _path, progress: at_step_four(Path("step-00000004"), progress)
    )
    with pytest.raises(CheckpointError, match=r"step 12 could not be written.*No space left"):
        trainer.train(dataclasses.replace(config, run_dir=tmp_path / "other"))


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [".metadata", "extra.safetensors", "shard", "state.json", "manifest.json"])
def test_a_pickle_in_the_folder_never_runs(tmp_path: Path, name: str) -> None:
    folder, canary = write(tmp_path, 1, *toy()), tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    path = shard_of(folder) if name == "shard" else folder / name
    path.write_bytes(poison)
    with pytest.raises(CheckpointError):
        checkpoint.find(tmp_path, report=pytest.fail)
    sealed = json.loads((folder / "manifest.json").read_text())["sealed"] if name != "manifest.json" else None
    if sealed is not None:  # whoever can write the folder can seal it too: still only data
        seals = [checkpoint.seal_file(item, Progress()) for item in folder.iterdir() if item.name != "manifest.json"]
        sealed["files"] = {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in seals}
        manifest = {"sealed": sealed, "sha256": files.json_sha256(sealed)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            shards.load(checkpoint.find(tmp_path, report=pytest.fail), toy()[0], CONFIG)
        except CheckpointError:
            assert name != ".metadata"
        else:
            assert name == ".metadata"  # nobody looks at it
    assert not canary.exists()
    pickle.loads(poison)  # the control: made above, it does run where something unpickles it
    assert canary.exists()


def test_swapped_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path, 1, *toy()), write(tmp_path, 2, *toy())
    shard_of(one).replace(tmp_path / "aside")
    shutil.copy(shard_of(two), one)
    assert is_refused(one) and not is_refused(two)
    one.rename(tmp_path / "gone")
    two.rename(one)  # an old one under a newer name, or the reverse
    assert is_refused(one)
    one.rename(two)
    manifest = json.loads((two / "manifest.json").read_text())
    manifest["sealed"]["format"] = 1
    manifest["sha256"] = files.json_sha256(manifest["sealed"])
    (two / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        checkpoint.find(tmp_path, report=pytest.fail)


def test_verify_names_the_good_and_the_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = write(tmp_path, 1, *toy()), write(tmp_path, 2, *toy())
    shard_of(newer).unlink()
    assert cli.main(["verify", str(tmp_path)]) == 0
    damaged, good = capsys.readouterr().out.splitlines()
    assert damaged.startswith(f"damaged  {newer}") and good.startswith(f"good     {older}: 1 step,")
    (older / "state.json").write_text("{}")
    assert cli.main(["verify", str(tmp_path)]) == 66


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "shard"])
@pytest.mark.parametrize("instead", ["pipe", "device", "link", "nested"])
def test_only_regular_files_are_read(tmp_path: Path, name: str, instead: str) -> None:
    """A pipe that nobody writes to would wait for ever, an endless device fill the memory."""
    folder = write(tmp_path, 2, *toy())
    path = shard_of(folder) if name == "shard" else folder / name
    aside = path.rename(tmp_path / "aside")
    if instead == "pipe":
        os.mkfifo(path)
    elif instead == "nested":
        path.write_text("[" * 1_000_000)
    else:
        path.symlink_to("/dev/zero" if instead == "device" else aside)
    assert is_refused(folder)
    path.unlink()
    aside.rename(path)
    assert not is_refused(folder)


def test_names_are_taken_for_no_more_than_they_are(tmp_path: Path) -> None:
    """A run folder may be called anything, and of other folders beside its checkpoints none is removed."""
    model, optimizer = toy()
    run = tmp_path / "step-00000007"
    kept = run / "checkpoints" / "step-00000001.by-hand"
    kept.mkdir(parents=True)
    for step in (1, 2, 123_456_789):
        newest = write(run / "checkpoints", step, model, optimizer, keep=1)
    for path in (run, run / "checkpoints", newest):
        assert checkpoint.find(path, report=pytest.fail).state["step"] == 123_456_789
        assert checkpoint.run_folder(path) == run
    assert sorted(path.name for path in newest.parent.iterdir()) == [kept.name, newest.name]


def test_what_a_commit_had_set_aside_is_found_and_put_back(tmp_path: Path) -> None:
    model, optimizer = toy()
    write(tmp_path, 1, model, optimizer)
    newest = write(tmp_path, 2, model, optimizer)
    aside = newest.rename(tmp_path / ".replaced-step-00000002-0123abcd")  # killed between the two renames
    assert checkpoint.find(tmp_path, report=pytest.fail).folder == aside
    write(tmp_path, 3, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint.verify(newest).state["step"] == 2


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
        shards.load(found, toy()[0], {**CONFIG, "width": 6})
    with pytest.raises(CheckpointError, match="holds other weights"):
        shards.load(found, nn.Linear(3, 5), CONFIG)
    for other, difference in (
        (toy()[0].double(), r"0.weight is torch.float32 \(5, 3\), expected torch.float64"),
        (
            nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2, bias=False)),
            r"0.weight is .*, expected torch.float32 \(5, 2\)",
        ),
    ):
        with pytest.raises(CheckpointError, match=difference):
            shards.load(found, other, CONFIG)
