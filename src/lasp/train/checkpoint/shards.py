"""Weights and optimizer state between the processes and a checkpoint's files, whatever each process holds of them.

torch.distributed.checkpoint does it, in its safetensors form: every process writes what no other writes, and reads
the parts of the files that it needs now, so a checkpoint of one layout loads in any other. Its usual form keeps a
pickle (`.metadata`) that runs code when loaded; this one has none: what lies where is in the files' own headers.

Names in the files:
    model.<parameter>               weights
    optimizer.<kind>.<parameter>    AdamW's tensors, by the name of their parameter
    random_state.cpu                of torch's default generator
    carried.<row>.<number>          what a row of the batch carries into the next step (--data.carry)
"""

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.futures import Future

from lasp import files
from lasp.errors import CheckpointError
from lasp.models.config import current_form
from lasp.train.checkpoint import sealed
from lasp.train.checkpoint.sealed import Checkpoint, FileSeal
from lasp.train.checkpoint.tensor_file import SUFFIX, TensorFile
from lasp.train.progress import PHASES, Progress
from lasp.train.settings_file import differences
from lasp.train.world import World

_RANDOM_STATE = "random_state.cpu"
# Under which a file's metadata says where in whole tensors its parts lie.
_PARTS = "DCP_SHARDING_INFO"
# Bytes handed to the system at once, and how many at most it has not put on disk: so a slow disk is seen to move.
_PIECE_BYTES, _UNSYNCED_BYTES = 16 << 20, 64 << 20


class Saver:
    """Writes checkpoints while training goes on, one at a time. All processes of a run call alike."""

    def __init__(self, root: Path, world: World, *, keep: int, beside: Mapping[str, bytes] | None = None) -> None:
        """root: folder of the run's checkpoints; keep: how many stay; beside: files to put into each, by name."""
        self.root, self.keep, self.beside = root, keep, beside or {}
        self._world = world
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._progress = Progress()
        self._step = 0

    def start(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        others: Mapping[str, Tensor] | None = None,
    ) -> str | None:
        """Copy weights and optimizer state to host memory, and go on writing them in the background.

        state: JSON-able; must hold "step". others: more tensors by name, equal where processes share a name. Waits for
        the write before, and returns its problem if it had one. Raises PeerLostError if that stands still.
        """
        before = self.finish()
        place = self._world.run_on_first(lambda: _begin(self.root, state["step"]))
        if "problem" in place:
            return f"{before}; {place['problem']}" if before else place["problem"]
        tensors = _model_tensors(module) | _optimizer_tensors(module, optimizer) | dict(others or {})
        # Copies: on a GPU's host or not, training changes the weights while the files are written.
        staged = DefaultStager(StagingOptions(False, False, False, False)).stage(tensors)
        self._progress, self._step = Progress(), state["step"]
        self._thread = threading.Thread(target=self._write, args=(Path(place["folder"]), staged, state), daemon=True)
        self._thread.start()
        return before

    def poll(self) -> str | None:
        """The problem of this process's write, if it has ended since; None if there was none or it goes on."""
        return None if self._thread is None or self._thread.is_alive() else self._ended()

    def finish(self) -> str | None:
        """Wait for the write under way on any process; what kept it from becoming a checkpoint, None if nothing did.

        Collective. It may take any time, as long as bytes are written: raises PeerLostError if a process stands still.
        """
        self._world.settle(self._thread, self._progress, f"writing the checkpoint of step {self._step}")
        return self._ended()

    def leave(self, timeout_s: float) -> str | None:
        """Wait for this process's write, not longer than that: `finish` where the others may be gone."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return f"the checkpoint of step {self._step} was still being written after {timeout_s:g} s"
        return self._ended()

    def _ended(self) -> str | None:
        self._thread = None
        problem, self._problem = self._problem, None
        return problem

    def _write(self, folder: Path, tensors: Any, state: dict[str, Any]) -> None:
        def commit(written: list[FileSeal]) -> None:
            for name, content in self.beside.items():
                files.write(folder / name, content)
            more = [sealed.seal_file(folder / name, self._progress) for name in self.beside]
            sealed.commit(folder, state, written + more, keep=self.keep)

        try:
            _quiet_about_one_process()
            dcp.save(
                tensors,
                storage_writer=_SealingWriter(folder, commit, self._progress),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                process_group=self._world.files,
                no_dist=self._world.files is None,
            )
        except BaseException as error:
            self._problem = f"the checkpoint of step {state['step']} could not be written: {_cause(error)}"
            if self._world.is_first:
                sealed.abandon(folder)


class _SealingWriter(HuggingFaceStorageWriter):
    """Safetensors files on disk and hashed by the process that wrote them; the first process seals them together.

    Both steps are within DCP's own: a failure of any process is a failure of all.
    """

    def __init__(self, folder: Path, commit: Callable[[list[FileSeal]], None], progress: Progress) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.sync_files = False  # it syncs before the last bytes have left its buffer; seal_file does it after
        self.fs = _SteadyFiles(progress)
        self._folder, self._commit, self._progress = folder, commit, progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        self._progress.enter("writing")
        written = super().write_data(plan, planner)
        written.wait()
        names = {result.storage_data.relative_path for result in written.value()}
        seals: Future[Any] = Future()
        seals.set_result([sealed.seal_file(self._folder / name, self._progress) for name in sorted(names)])
        self._progress.enter(PHASES[0])
        return seals

    def finish(self, metadata: Metadata, results: Any) -> None:
        self._progress.enter("sealing")
        self._commit([seal for written in results for seal in written])


class _SteadyFiles(FileSystem):
    """Files that are new, and go to disk in pieces that are noted."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with _SteadyFile(path, self._progress) as stream:
            yield stream


class _SteadyFile(io.FileIO):
    def __init__(self, path: str | os.PathLike[str], progress: Progress) -> None:
        super().__init__(path, "x")
        self._progress, self._unsynced = progress, 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while len(view):
            written = super().write(view[:_PIECE_BYTES])
            view = view[written:]
            self._unsynced += written
            if self._unsynced >= _UNSYNCED_BYTES:
                os.fsync(self)
                self._unsynced = 0
            self._progress.note()
        return len(data)


class _NotedLoading(DefaultLoadPlanner):
    """Notes every tensor read."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self._progress = progress

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self._progress.note()


class _CarefulReader(HuggingFaceStorageReader):
    """Reads the files as PyTorch's own does, which maps them (lasp.train.checkpoint.tensor_file says why not)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def read_metadata(self) -> Metadata:
        found: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, Path] = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            with TensorFile(path) as file:
                parts = files.parse_json(file.metadata[_PARTS].encode())
                for name, stored in file.tensors.items():
                    offsets = torch.Size(parts[name]["saved_offsets"])
                    part = ChunkStorageMetadata(offsets, torch.Size(stored.shape))
                    whole = found.setdefault(
                        name, TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), [])
                    )
                    ends = [offset + length for offset, length in zip(offsets, stored.shape, strict=True)]
                    whole.size = torch.Size(map(max, whole.size, ends))
                    whole.chunks.append(part)
                    places[MetadataIndex(name, offsets)] = path
        return Metadata(found, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))  # type: ignore[arg-type]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index], []).append(item)  # type: ignore[arg-type]
        for path, items in by_file.items():
            with TensorFile(path) as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.read(item.storage_index.fqn, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def load(
    found: Checkpoint,
    module: nn.Module,
    model_config: dict[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    world: World | None = None,
) -> None:
    """Copy the weights into `module`, however it is spread over the processes now; collective over `world`.

    optimizer: restore its state too, and the CPU random state. Raises CheckpointError if the tensors do not fit, with
    a diff if the model's config has changed.
    """
    refuse_other_model(found.folder, found.state["model_config"], model_config)
    saved = _saved(found)
    tensors = _model_tensors(module)
    stored = {name for name in saved if name.startswith("model.")}
    if stored != tensors.keys():
        raise CheckpointError(f"{found.folder} holds other weights: {sorted(stored ^ tensors.keys())}")
    if optimizer is not None:
        tensors |= _empty_state(found, saved, module, optimizer)
    _read(found, saved, tensors, world)
    if optimizer is not None:
        torch.set_rng_state(tensors[_RANDOM_STATE])


def load_others(found: Checkpoint, tensors: dict[str, Tensor], world: World) -> None:
    """Fill what `Saver.start` was given as `others`; collective. Raises CheckpointError if it does not fit."""
    _read(found, _saved(found), tensors, world)


def _saved(found: Checkpoint) -> dict[str, Any]:
    """Read the files' metadata of every tensor in them."""
    try:
        return dict(_CarefulReader(found.folder).read_metadata().state_dict_metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{found.folder}: the tensor files cannot be read: {error!r}") from error


def _read(found: Checkpoint, saved: Mapping[str, Any], tensors: dict[str, Tensor], world: World | None) -> None:
    _check_fit(found, saved, tensors)
    group = world.files if world is not None else None
    progress, failures = Progress(), list[BaseException]()

    def read() -> None:
        try:
            if world is not None and world.device.type == "cuda":
                torch.cuda.set_device(world.device)
            progress.enter("reading")
            _quiet_about_one_process()
            dcp.load(
                tensors,
                storage_reader=_CarefulReader(found.folder),
                planner=_NotedLoading(progress),
                process_group=group,
                no_dist=group is None,
            )
        except BaseException as error:
            failures.append(error)

    # Apart, so that this thread can see whether all processes get on.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    if world is None:
        thread.join()
    else:
        world.settle(thread, progress, f"loading {found.folder}")
    if failures and isinstance(failures[0], CheckpointException):
        raise CheckpointError(f"{found.folder} could not be loaded: {_cause(failures[0])}") from failures[0]
    if failures:
        raise failures[0]


def refuse_other_model(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError, with what differs, unless both configurations are of one model."""
    changes = differences(_plain(current_form(before)), _plain(current_form(now)))
    if changes:
        raise CheckpointError(f"{folder} was written by another model; checkpoint -> now:\n  " + "\n  ".join(changes))


def _empty_state(
    found: Checkpoint, saved: Iterable[str], module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimizer's tensors, made anew for the parameters that this process steps and that had a state."""
    own, names = _own(optimizer), _names(module)
    kinds: dict[str, list[str]] = {}
    for key in saved:
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            kinds.setdefault(name, []).append(kind)
    if unknown := sorted(kinds.keys() - names.values()):
        raise CheckpointError(f"{found.folder} has an optimizer state for unknown parameters: {unknown}")
    own.state.clear()
    for parameter in (parameter for group in own.param_groups for parameter in group["params"]):
        if names[parameter] in kinds:  # else it was never stepped
            own.state[parameter] = {
                # Where a fused AdamW keeps its count.
                kind: torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter.data)
                for kind in kinds[names[parameter]]
            }
    return _optimizer_tensors(module, optimizer)


def _check_fit(found: Checkpoint, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    # DCP itself would load fp32 into int64 without a word.
    for name, tensor in tensors.items():
        if name not in saved:
            raise CheckpointError(f"{found.folder} does not hold {name}")
        dtype, shape = saved[name].properties.dtype, tuple(saved[name].size)
        if (dtype, shape) != (tensor.dtype, tuple(tensor.shape)):
            raise CheckpointError(
                f"{found.folder}: {name} is {dtype} {shape}, expected {tensor.dtype} {tuple(tensor.shape)}"
            )


def _model_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in module.named_parameters()}


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors on this process, by the name of their parameter and by kind."""
    names = _names(module)
    return {names[parameter]: dict(entry) for parameter, entry in _own(optimizer).state.items()}


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {
        f"optimizer.{kind}.{name}": tensor
        for name, entry in optimizer_state(module, optimizer).items()
        for kind, tensor in entry.items()
    }
    return tensors | {_RANDOM_STATE: torch.get_rng_state()}


def _own(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps this process's share of the parameters."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _names(module: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


def _begin(root: Path, step: int) -> dict[str, Any]:
    try:
        return {"folder": str(sealed.begin(root, step))}
    except OSError as error:
        return {"problem": f"the checkpoint of step {step} could not be begun: {error}"}


def _cause(error: BaseException) -> str:
    """One line: of several processes' failures the first."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {cause!r}"
    return repr(error)


def _quiet_about_one_process() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as JSON gives it back, but for how its softmax layers exchange, which may change."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    mixers = plain.get("mixer")
    if isinstance(mixers, dict):
        plain["mixer"] = _without_method(mixers)
    elif isinstance(mixers, list):
        plain["mixer"] = [_without_method(mixer) for mixer in mixers]
    return plain


def _without_method(mixer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mixer.items() if name != "softmax_method"}
