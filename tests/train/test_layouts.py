"""The loss curve belongs to the data and the seed, not to how many processes share the work."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from training_runs import small_config

from lasp.data import store as token_store
from lasp.data.tokenizer import ByteTokenizer
from lasp.distributed.mesh import build_mesh, data_rank, weights_mesh
from lasp.train import model as models
from lasp.train import step, trainer
from lasp.train.config import ParallelOptions, TrainConfig
from lasp.train.logging.metrics import read_metrics


def losses(config: TrainConfig, num_processes: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """The loss of every step of a run over `num_processes` forked processes; `before` runs first in each."""

    def train(_rank: int) -> None:
        before()
        trainer.train(config)

    world.run(num_processes, train)
    assert config.run_dir is not None
    return [line["loss"] for line in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in line]


def furthest(curve: list[float], reference: list[float]) -> float:
    """Largest relative difference of two curves of one length."""
    assert len(curve) == len(reference)
    return max(abs(a - b) / b for a, b in zip(curve, reference, strict=True))


def whole_end(run_dir: Path) -> None:
    """Check that a run has left its scores, sample, curve and checkpoint."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert any("validation_bits_per_byte" in line for line in lines)
    assert any("trigram_bits_per_byte" in line for line in lines)
    assert len((run_dir / "sample.txt").read_text()) > 4 and (run_dir / "curve.png").stat().st_size > 1000
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


STEPS = 20


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("reference")
    curve = losses(small_config(folder, steps=STEPS), 1)
    assert len(curve) == STEPS and curve[-1] < 0.7 * curve[0]
    return folder, curve


@pytest.mark.parametrize(
    ("dp", "sp", "accumulation"),
    [
        pytest.param(1, 2, 1, marks=pytest.mark.exhaustive),
        pytest.param(1, 4, 1, marks=pytest.mark.ci),
        pytest.param(2, 2, 1, marks=pytest.mark.ci),
        (1, 2, 2),
    ],
)
def test_every_layout_has_the_same_loss_curve(
    reference: tuple[Path, list[float]], dp: int, sp: int, accumulation: int
) -> None:
    folder, curve = reference
    run_dir = folder / f"run-{dp}-{sp}-{accumulation}"
    config = small_config(folder, dp=dp, sp=sp, accumulation=accumulation, steps=STEPS, run_dir=run_dir)
    assert furthest(losses(config, dp * sp), curve) < 1e-5
    sent = {line["exchanged_bytes"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line}
    assert len(sent) == 1 and sent.pop() > 0  # the same every step
    whole_end(run_dir)


@pytest.mark.ci
@pytest.mark.parametrize(
    "options",
    [
        {"data_parallel": "zero3", "dp_replicate": 2, "recomputation": "selective", "ffn_piece_tokens": 10},
        {"data_parallel": "zero1", "recomputation": "full"},
    ],
)
def test_what_processes_keep_does_not_change_the_loss_curve(
    reference: tuple[Path, list[float]], options: dict[str, Any], tmp_path: Path
) -> None:
    folder, curve = reference
    parallel = ParallelOptions(sp=2, dp=2, timeout_s=30, **options)
    config = small_config(folder, parallel=parallel, steps=STEPS, run_dir=tmp_path / "run")
    assert furthest(losses(config, 4), curve) < 1e-5
    whole_end(tmp_path / "run")


def no_exchange() -> None:
    """Each shard for itself, as if it were a sequence."""
    spread = models.parallelize

    def without(*arguments: object, **options: object) -> object:
        model = spread(*arguments, **options)  # type: ignore[arg-type]
        model.sp = None
        return model

    models.parallelize = without  # type: ignore[assignment]


def averaged_gradients() -> None:
    """The shares averaged, as DDP does by itself, and not summed."""
    models.ParallelModel.mean_loss = lambda _self, loss_sum, tokens: loss_sum / tokens  # type: ignore[assignment, method-assign]


def labels_shifted_after_sharding() -> None:
    """A shard's last token predicts nothing of the next shard."""
    original = step.Sequences.batch

    def shifted(*arguments: object, **options: object) -> object:
        batch = original(*arguments, **options)  # type: ignore[arg-type]
        batch.labels[:, -1] = -100
        return batch

    step.Sequences.batch = shifted  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("damage", [no_exchange, averaged_gradients, labels_shifted_after_sharding])
def test_the_comparison_can_fail(
    reference: tuple[Path, list[float]], damage: Callable[[], None], tmp_path: Path
) -> None:
    folder, curve = reference
    short = 10
    config = small_config(folder, sp=2, steps=short, run_dir=tmp_path / "run")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule_steps=STEPS))
    assert furthest(losses(config, 2, before=damage), curve[:short]) > 1e-4


def test_a_mesh_that_does_not_fit_says_what_to_start() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        build_mesh(sp=1)

    def messages(_rank: int) -> list[str]:
        found = []
        for sizes in ({"sp": 2}, {"sp": 1, "dp": 2}, {"sp": 0}, {"sp": 1, "dp_replicate": 2}):
            with pytest.raises(ValueError) as error:  # noqa: PT011 - the messages are compared below
                build_mesh(**sizes)  # type: ignore[arg-type]
            found.append(str(error.value))
        return found

    for split, size, zero, copies in world.run(3, messages):
        assert "3 processes cannot be split into sequence groups of sp=2" in split
        assert "dp=2 x sp=1 needs 2 processes, but the world has 3" in size
        assert "at least 1" in zero
        assert "dp_replicate must divide dp=3" in copies


def test_sequence_groups_are_neighbours() -> None:
    def groups(_rank: int) -> list[list[int]]:
        import torch.distributed as dist

        mesh = build_mesh(sp=2, dp_replicate=2, timeout_s=20)
        assert mesh.mesh_dim_names == ("dp_replicate", "dp_shard", "sp")
        weights = weights_mesh(mesh, timeout_s=20)
        assert weights.mesh_dim_names == ("dp_replicate", "dp_shard_sp")
        made = [axes[name].get_group() for axes in (mesh, weights) for name in axes.mesh_dim_names or ()]
        # All have their own deadline: none is torch's half hour.
        deadlines = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made}
        assert deadlines == {20.0}
        return [data_rank(mesh), *(dist.get_process_group_ranks(group) for group in made)]  # type: ignore[list-item]

    found = world.run(8, groups)
    assert found[0] == [(0, 4), [0, 4], [0, 2], [0, 1], [0, 4], [0, 1, 2, 3]]
    assert found[7] == [(3, 4), [3, 7], [5, 7], [6, 7], [3, 7], [4, 5, 6, 7]]


def test_the_text_is_prepared_once_for_all(tmp_path: Path) -> None:
    config = small_config(tmp_path, sp=2, steps=1)
    losses(config, 2)
    store = token_store.prepare(
        folder=config.data.path,
        suffixes=config.data.suffixes,
        field=config.data.field,
        tokenizer=ByteTokenizer(),
        validation_fraction=config.data.validation_fraction,
        seed=config.data.seed,
        cache=config.data.cache,
    )
    assert [path.name for path in config.data.cache.iterdir() if path.is_dir()] == [store.folder.name]


def test_bf16_follows_fp32_on_any_layout(tmp_path: Path) -> None:
    """Half the digits, the same curve to a percent; the layouts of bf16 agree better than bf16 and fp32 do."""
    curves = {}
    for precision, sp in (("fp32", 1), ("bf16", 1), ("bf16", 2)):
        config = small_config(tmp_path, sp=sp, precision=precision, run_dir=tmp_path / f"{precision}-{sp}")
        curves[precision, sp] = losses(config, sp)
    rounding = furthest(curves["bf16", 1], curves["fp32", 1])
    assert 1e-6 < rounding < 1e-2
    assert furthest(curves["bf16", 2], curves["bf16", 1]) < 5e-3
