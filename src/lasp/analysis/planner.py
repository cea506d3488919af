"""Estimates every layout of a run, of every method: if it fits, how fast it is, and which is best.

A layout is a method, dp groups of sp ranks, a sharding of weights, and a recomputation. Methods:
    lasp      the state crosses ranks, by the schedule with the least predicted time
    ulysses   tokens are traded for heads around every attention; sp must divide the heads
    megatron  tensor parallelism with activations cut along tokens between blocks; sp must divide the heads
    ring      Ring Attention: the same model with softmax attention in every layer
    data      no sequence is divided: sp = 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from lasp.analysis import volume
from lasp.analysis.devices import Device
from lasp.analysis.memory import Memory, training_memory
from lasp.analysis.model import Layer, embedding_parameters, layer, layers, num_parameters
from lasp.analysis.timing import Compute, collective, compute
from lasp.distributed.mesh import DATA_PARALLEL
from lasp.exchange.auto import rank_schedules
from lasp.exchange.cost import Constants, Model
from lasp.exchange.payload import Payload
from lasp.exchange.registry import EXCHANGES
from lasp.models.config import ModelConfig
from lasp.models.recomputation import RECOMPUTATIONS
from lasp.softmax.functions import chosen_method

METHODS = ("lasp", "ulysses", "megatron", "ring", "data")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train, its batches, and the devices to train it on.

    Attributes:
        batch: sequences of a step, over all devices.
        seq_len: tokens of each.
        slowdown, kept: time of a device's own work relative to the roofline's, and memory of what blocks keep relative
            to the lists'; see lasp.analysis.measured.
        compiled: blocks are.
    """

    config: ModelConfig
    device: Device
    devices: int
    seq_len: int
    batch: int
    slowdown: float = 1.0
    kept: float = 1.0
    compiled: bool = False

    def __post_init__(self) -> None:
        for name, value in (("devices", self.devices), ("seq_len", self.seq_len), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class ParallelLayout(NamedTuple):
    """A way to run a job; see the module."""

    method: str
    dp: int
    sp: int
    sharding: str
    recomputation: str
    schedule: str


class Estimate(NamedTuple):
    """A layout's predicted cost.

    Attributes:
        memory: of the fullest device.
        step_s: seconds of a step.
        compute_s: of these, the device's own work.
        exposed_s: of these, waiting for other devices.
        sequence_s: communication along the sequence, hidden or not. data_s: of weights and gradients.
        received_bytes: by one rank along the sequence, in a step.
        attention_s: of compute_s, attention kernels.
    """

    layout: ParallelLayout
    memory: Memory
    capacity_bytes: float
    step_s: float
    compute_s: float
    exposed_s: float
    sequence_s: float
    data_s: float
    received_bytes: float
    attention_s: float
    tokens: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity_bytes

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def communication_share(self) -> float:
        return self.exposed_s / self.step_s


def nodes_of(device: Device, ranks: int) -> tuple[int, ...]:
    """Number of consecutive ranks that share a host, host after host."""
    whole, rest = divmod(ranks, device.per_node)
    return (device.per_node,) * whole + (rest,) * (rest > 0)


def problem(job: Job, method: str, sp: int) -> str | None:
    """The reason that a method cannot divide a sequence over `sp` devices; None if it can."""
    dp, config = job.devices // sp, job.config
    if job.devices % sp:
        return f"{job.devices} devices are no multiple of sp={sp}"
    if job.batch % dp:
        return f"a batch of {job.batch} cannot be spread over dp={dp}"
    if method == "data":
        return None if sp == 1 else "data parallelism does not divide sequences"
    if sp == 1:
        return "nothing to divide"
    if job.seq_len % sp:
        return f"{job.seq_len} tokens are no multiple of sp={sp}"
    operator = layer(config, 0).operator
    if method in ("ulysses", "megatron") and operator.num_heads % sp:
        return f"sp={sp} does not divide the {operator.num_heads} heads"
    if method == "megatron" and (operator.num_key_heads % sp or config.ffn_dim % sp):
        return f"sp={sp} does not divide key heads or feed-forward channels"
    return None


def estimate(job: Job, layout: ParallelLayout) -> Estimate:
    """Estimate the time and memory of a step in a layout.

    Assumes: the exchange of a layer waits for nothing but hides behind the local part of attention's backward pass
    only; collectives of other methods hide behind nothing; gathering and reducing of weights and gradients hides
    behind three quarters of the backward pass (and half of the forward, where it is gathered).
    """
    config, device, sp = job.config, job.device, layout.sp
    batch, tokens = job.batch // layout.dp, job.seq_len // sp
    narrow = 2 if device.precision == "bf16" else 4
    is_tensor = layout.method == "megatron"
    parameters = num_parameters(config)
    ranks = layout.dp if is_tensor else job.devices
    updated = parameters / (1 if layout.sharding == "ddp" else ranks) / (sp if is_tensor else 1)
    own = compute(
        config,
        device,
        batch=batch,
        tokens=tokens * sp if is_tensor else tokens,
        context=job.seq_len,
        recomputation=layout.recomputation,
        optimizer_parameters=updated,
        softmax_everywhere=layout.method == "ring",
        share=1 / sp if is_tensor else 1.0,
    ).scaled(job.slowdown)
    sequence_s, exposed, received = _along_sequence(job, layout, own, batch, tokens, narrow)
    data_s = _of_weights(job, layout, parameters, narrow)
    hidden = 0.75 * own.backward + (0.5 * own.forward if layout.sharding in ("zero2", "zero3") else 0.0)
    exposed += max(0.0, data_s - hidden)
    memory = training_memory(
        config,
        batch=batch,
        tokens=tokens,
        precision=device.precision,
        recomputation=layout.recomputation,
        sharding=layout.sharding,
        ranks=ranks,
        processors=device.processors,
        # Ulysses and ring keep what they exchanged beside what they were given; tensor parallelism gathers its input.
        extra_per_token=_kept(config, narrow) if layout.method == "ulysses" else 0.0,
        compiled=job.compiled,
        weight_share=1 / sp if is_tensor else 1.0,
        buffers=_buffers(config, layout, batch, tokens, narrow),
    ).scaled(job.kept, keeps=layout.recomputation == "none", alone=ranks == 1)
    return Estimate(
        layout=layout,
        memory=memory,
        capacity_bytes=device.memory_bytes * device.memory_share,
        step_s=own.total + exposed,
        compute_s=own.total,
        exposed_s=exposed,
        sequence_s=sequence_s,
        data_s=data_s,
        received_bytes=received,
        attention_s=own.attention,
        tokens=job.batch * job.seq_len,
    )


def _kept(config: ModelConfig, narrow: int) -> float:
    mixer = config.mixer_of(0)
    return narrow * mixer.num_heads * 2.0 * (mixer.key_dim + mixer.value_dim)


def _buffers(config: ModelConfig, layout: ParallelLayout, batch: int, tokens: int, narrow: int) -> float:
    """Tensors that only the method needs, of one layer: gathered inputs, keys and values under way, or gathered."""
    positions = float(batch * tokens * narrow)
    if layout.sp == 1:
        return 0.0
    softmax = [each for each in layers(config) if each.transition is None]
    mixer = config.mixer_of(0)
    key_heads = softmax[0].operator.num_key_heads if softmax else mixer.num_heads
    key_values = key_heads * (mixer.key_dim + mixer.value_dim)
    if layout.method == "megatron":
        return positions * layout.sp * 2 * config.d_model
    if layout.method == "ring":
        return positions * key_values * 4
    if layout.method != "lasp" or not softmax:
        return 0.0
    if _softmax_method(softmax[0], layout.sp) == "ulysses":
        return positions * 2 * (mixer.num_heads * (mixer.key_dim + mixer.value_dim) + key_values)
    return positions * layout.sp * key_values * 2


def _softmax_method(each: Layer, sp: int) -> str:
    """Return how a softmax layer exchanges."""
    method: str = getattr(each.mixer, "softmax_method", "auto")
    return chosen_method(each.mixer.num_heads, sp) if method == "auto" else method


def _along_sequence(
    job: Job, layout: ParallelLayout, own: Compute, batch: int, tokens: int, narrow: int
) -> tuple[float, float, float]:
    """Seconds of communication along the sequence, of these not hidden, and bytes received by the last rank."""
    config, device, sp = job.config, job.device, layout.sp
    if sp == 1:
        return 0.0, 0.0, 0.0
    nodes = nodes_of(device, sp)
    seconds = exposed = received = 0.0
    for each in layers(config):
        cost = each.cost
        shard = volume.ShardShape(
            batch=batch,
            tokens=tokens,
            d_model=config.d_model,
            heads=each.mixer.num_heads,
            key_heads=cost.operator.num_key_heads,
            key_dim=each.mixer.key_dim,
            value_dim=each.mixer.value_dim,
            itemsize=narrow,
        )
        again = 1 if layout.recomputation == "full" else 0
        if layout.method == "lasp" and each.transition is not None:
            load = each.load(batch)
            once, moved = _exchange(layout.schedule, load, nodes, device.constants)
            visible = (1 + again) * once + max(0.0, once - own.hidden_backward)
            if cost.convolved:
                moved += volume.halo(cost.convolved, batch, cost.conv_width, narrow, sp - 1, sp)
                convolution = 2 * device.constants.across.latency_s if len(nodes) > 1 else 2 * device.inside.latency_s
                once, visible = once + convolution / 2, visible + convolution
        else:
            formulas = {
                "all_gather": volume.gathered_softmax,
                "ulysses": volume.ulysses,
                "megatron": volume.megatron,
                "ring": volume.ring_attention,
            }
            method = _softmax_method(each, sp) if layout.method == "lasp" else layout.method
            moved = formulas[method](shard, 0, sp)
            collectives = {"all_gather": 2, "ulysses": 4, "megatron": 10, "ring": 2 * (sp - 1)}[method]
            if layout.method == "ulysses" and each.transition is not None:
                moved = volume.megatron_all_to_all(shard, 0, sp, gates=cost.gates if cost.convolved else 0)
            there, back = (max(traffic) for traffic in moved)
            latency = collectives * collective(device, 1e-9, sp)
            once = (there + back) / _bandwidth(device, sp) + latency
            visible = once + again * (there / _bandwidth(device, sp) + latency / 2)
            if layout.method == "ring":  # a block travels while the one before is worked on
                visible = max(0.0, visible - own.attention / config.num_layers)
            once /= 2
        seconds += (2 + again) * once
        exposed += visible
        received += moved.step.received_bytes + again * moved.forward.received_bytes
    return seconds, exposed, received


def _bandwidth(device: Device, ranks: int) -> float:
    return (device.inside if ranks <= device.per_node else device.across).bytes_per_s


def _of_weights(job: Job, layout: ParallelLayout, parameters: int, narrow: int) -> float:
    """Seconds in which gradients are summed and weights gathered."""
    device, ranks, outside = job.device, job.devices, embedding_parameters(job.config)
    if layout.method == "megatron":
        parameters, outside, ranks = parameters // layout.sp, outside // layout.sp, layout.dp
    if ranks == 1:
        return 0.0
    kinds = {
        "ddp": lambda: volume.ddp(parameters, ranks),
        "zero1": lambda: volume.zero1(parameters, ranks),
        "zero2": lambda: volume.zero2(parameters, ranks, parameter_itemsize=narrow),
        "zero3": lambda: volume.zero3(parameters, ranks, once=outside, parameter_itemsize=narrow),
    }
    # The ranks of one tensor-parallel group are neighbours, so those that share a summand are on different hosts.
    spread = job.devices if layout.method == "megatron" else ranks
    return collective(device, kinds[layout.sharding]().received_bytes, spread)


@lru_cache(maxsize=1024)
def _exchange(name: str, load: Payload, nodes: tuple[int, ...], constants: Constants) -> tuple[float, volume.Volume]:
    """Seconds of one exchange by the schedule `name`, and what the last rank moves in both directions."""
    schedule = EXCHANGES[name]()
    seconds = schedule.seconds(Model(load, nodes, constants), want_total=False)
    return seconds, volume.state_exchange(schedule, load, sum(nodes) - 1, nodes)


def schedules_for(job: Job, dp: int, sp: int) -> tuple[str, ...]:
    """Names of the schedules for a job's states, fastest first; those of `auto`, which `reach` is not among."""
    recurrent = [each for each in layers(job.config) if each.transition is not None]
    if sp == 1 or not recurrent:
        return ("none",)
    ranked = rank_schedules(recurrent[-1].load(job.batch // dp), nodes_of(job.device, sp), job.device.constants)
    names = {type(make()): name for name, make in EXCHANGES.items()}
    return tuple(names[type(candidate.exchange)] for candidate in ranked)


@lru_cache(maxsize=64)
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(each for each in range(1, number + 1) if number % each == 0)


def layouts(job: Job, method: str, *, every_schedule: bool = False) -> Iterator[ParallelLayout]:
    """All layouts of a method that can run the job, with the fastest schedule or with each."""
    for sp in _divisors(job.devices):
        if problem(job, method, sp) is not None:
            continue
        dp = job.devices // sp
        schedules = schedules_for(job, dp, sp) if method == "lasp" else ("-",)
        schedules = schedules if every_schedule else schedules[:1]
        # Only the state that entered a rank is worth keeping where all else runs again.
        kept = method == "lasp" and sp > 1
        recomputations = [each for each in RECOMPUTATIONS if kept or each != "selective"]
        for sharding, recomputation, schedule in product(DATA_PARALLEL, recomputations, schedules):
            yield ParallelLayout(method, dp, sp, sharding, recomputation, schedule)


def best(job: Job, method: str) -> Estimate | None:
    """The fastest layout of a method that fits, or the one nearest to fitting; None where it cannot divide the job."""
    estimates = [estimate(job, layout) for layout in layouts(job, method)]
    fitting = [each for each in estimates if each.fits]
    if fitting:
        return min(fitting, key=lambda each: each.step_s)
    return min(estimates, key=lambda each: each.memory.total, default=None)


def longest(config: ModelConfig, device: Device, devices: int, method: str, *, batch: int = 1) -> int:
    """The longest sequence, a power of two, that fits on `devices` with any layout; 0 for none. No longer than 2^40."""
    for power in range(40, 6, -1):
        job = Job(config=config, device=device, devices=devices, seq_len=1 << power, batch=batch)
        # Nothing saves more memory than to share a sequence among all and to run blocks again.
        frugal = [each for each in layouts(job, method) if each.recomputation == "full" and each.sharding == "zero3"]
        if any(estimate(job, each).fits for each in frugal):
            return 1 << power
    return 0
