"""Kinds of devices and their figures; every figure says where it comes from.

Bandwidths are bytes/s in one direction. "datasheet" is NVIDIA's for the named part, dense matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lasp.exchange.cost import GLOO, NCCL, Constants, Link

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind.

    Attributes:
        memory_bytes: of one device, and the share of it that a run can use.
        peak_flops: of matrix products in `precision`, and the share of it that large ones reach.
        other_flops: the peak in the other precision, and what that rests on.
        peak_bytes_per_s: of its memory, and the share of it that kernels reach.
        softmax_share: of peak_flops that softmax attention reaches.
        precision: of training, "bf16" or "fp32".
        processors: streaming multiprocessors; None for a CPU.
        per_node: devices of one host.
        inside, across: bandwidth of collectives of large tensors for one rank, in a host and between hosts.
        constants: of small messages, for exchanges.
        host_s_per_layer: time in which the host can start one layer's kernels, forward and backward; a step is never
            faster.
        host_s_per_chunk: time that the host spends on one chunk of a scan over chunks, where it walks them itself.
        sources: for every figure, what it rests on.
    """

    name: str
    memory_bytes: float
    memory_share: float
    peak_flops: float
    other_flops: float
    other_source: str
    flops_share: float
    peak_bytes_per_s: float
    bytes_share: float
    softmax_share: float
    precision: str
    processors: int | None
    per_node: int
    inside: Link
    across: Link
    constants: Constants
    host_s_per_layer: float
    host_s_per_chunk: float
    sources: dict[str, str] = field(hash=False)

    @property
    def flops(self) -> float:
        return self.peak_flops * self.flops_share

    @property
    def bytes_per_s(self) -> float:
        return self.peak_bytes_per_s * self.bytes_share

    def training_in(self, precision: str) -> Device:
        """The same device, training in "bf16" or "fp32"."""
        if precision == self.precision:
            return self
        return replace(
            self,
            precision=precision,
            peak_flops=self.other_flops,
            other_flops=self.peak_flops,
            other_source=self.sources["flops"],
            sources=self.sources | {"flops": self.other_source},
        )


def _network(inside: float, across: float) -> tuple[Link, Link, Constants]:
    """NCCL's default latencies with the bandwidths of a kind of node."""
    constants = replace(
        NCCL,
        message=Link(NCCL.message.latency_s, inside),
        shift=Link(NCCL.shift.latency_s, inside),
        gather=NCCL.gather._replace(bytes_per_s=inside),
        all_to_all=NCCL.all_to_all._replace(bytes_per_s=inside),
        broadcast=NCCL.broadcast._replace(bytes_per_s=inside),
        across=Link(NCCL.across.latency_s, across),
        source=f"NCCL's default latencies; {inside / 1e9:.0f} GB/s in a host, {across / 1e9:.0f} GB/s between hosts",
    )
    return Link(30e-6, inside), Link(60e-6, across), constants


# Shares that large kernels reach of the datasheet's peaks, from one H100: bf16 products 694-738 of 989 TFLOP/s, copies
# 3.00 of 3.35 TB/s, cuDNN causal softmax attention forward and backward of 65,536 tokens, 16 heads of 128 in 115 ms.
_MATMUL, _COPY = 0.72, 0.9
_SOFTMAX = 3.5 * 2 * 65536**2 * 16 * 128 / 0.115 / 989e12
# Of the memory, by whatever is not a tensor: context, NCCL's buffers, fragments.
_USABLE = 0.88
_FREE = f"{_USABLE:.0%} usable assumed (context, NCCL buffers, fragments)"
_FP32 = "datasheet peak of fp32 products, which PyTorch keeps off the tensor cores; share assumed as in bf16"
_NETWORK = "assumed: 80 % of the datasheet's bandwidth; latencies are NCCL's defaults of lasp.exchange.cost"
_H100_SOURCES = {
    "memory": f"datasheet; {_FREE}",
    "flops": "datasheet peak; share measured on an H100",
    "bandwidth": "datasheet peak; share measured on an H100",
    "softmax": "share measured on an H100",
    "network": f"{_NETWORK}; NVLink 4 450 GB/s, 400 Gbit/s adapter a GPU",
    "host": "assumed 1.5 ms a layer, forward and backward: about 200 kernel starts",
}

_A100_NETWORK = _network(0.8 * 300e9, 0.8 * 25e9)
_H100_NETWORK = _network(0.8 * 450e9, 0.8 * 50e9)

A100 = Device(
    name="A100-80G",
    memory_bytes=80 * GIB,
    memory_share=_USABLE,
    peak_flops=312e12,
    other_flops=19.5e12,
    other_source=_FP32,
    flops_share=_MATMUL,
    peak_bytes_per_s=2.039e12,
    bytes_share=_COPY,
    softmax_share=_SOFTMAX,
    precision="bf16",
    processors=108,
    per_node=8,
    inside=_A100_NETWORK[0],
    across=_A100_NETWORK[1],
    constants=_A100_NETWORK[2],
    host_s_per_layer=1.5e-3,
    host_s_per_chunk=0.0,
    sources=_H100_SOURCES
    | {
        "flops": "datasheet peak; share assumed as measured on an H100",
        "bandwidth": "datasheet peak (SXM); share assumed as measured on an H100",
        "softmax": "share assumed as measured on an H100",
        "network": f"{_NETWORK}; NVLink 3 300 GB/s, 200 Gbit/s adapter a GPU (DGX A100)",
    },
)
H100 = Device(
    name="H100",
    memory_bytes=80 * GIB,
    memory_share=_USABLE,
    peak_flops=989e12,
    other_flops=66.9e12,
    other_source=_FP32,
    flops_share=_MATMUL,
    peak_bytes_per_s=3.35e12,
    bytes_share=_COPY,
    softmax_share=_SOFTMAX,
    precision="bf16",
    processors=132,
    per_node=8,
    inside=_H100_NETWORK[0],
    across=_H100_NETWORK[1],
    constants=_H100_NETWORK[2],
    host_s_per_layer=1.5e-3,
    host_s_per_chunk=0.0,
    sources=_H100_SOURCES,
)
H200 = replace(
    H100,
    name="H200",
    memory_bytes=139 * GIB,
    flops_share=790 / 989,
    peak_bytes_per_s=4.8e12,
    sources=_H100_SOURCES | {"flops": "datasheet peak; 790 TFLOP/s of bf16 products measured on an H200"},
)
# One process of one thread. Products, copies and softmax attention were measured on a two-core Xeon (AVX-512); the
# share of copies' speed that a step reaches (fresh memory, many small operations) is fitted to one measured step.
CPU = Device(
    name="cpu",
    memory_bytes=8 * GIB,
    memory_share=_USABLE,
    peak_flops=170e9,
    other_flops=170e9,
    other_source="assumed as in fp32: not every CPU has bf16 products",
    flops_share=0.8,
    peak_bytes_per_s=27.6e9,
    bytes_share=0.2,
    softmax_share=81 / 170,
    precision="fp32",
    processors=None,
    per_node=1 << 20,
    inside=Link(300e-6, 0.8e9),
    across=Link(300e-6, 0.8e9),
    constants=GLOO,
    host_s_per_layer=0.0,
    host_s_per_chunk=19e-6,
    sources={
        "memory": f"assumed 8 GiB a process; {_FREE}",
        "flops": "measured: fp32 products of one thread of a two-core Xeon, 139 to 175 GFLOP/s by size",
        "bandwidth": "measured copy; share fitted to a step of transnormer-tiny, 2,048 tokens in 0.20 s",
        "softmax": "measured: PyTorch's kernel, forward and backward, 1,024 tokens, 81 GFLOP/s",
        "network": "measured: lasp.exchange.cost.GLOO, between processes on a two-core machine",
        "host": "measured: 19 us a chunk and scan of the PyTorch kernels; the rest is part of the fitted share",
    },
)
DEVICES = {device.name.lower(): device for device in (A100, H100, H200, CPU)}


def device(name: str) -> Device:
    """A kind by name, in any case.

    Raises:
        ValueError: it is unknown.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ValueError(f"unknown device {name!r}; known: {', '.join(each.name for each in DEVICES.values())}")
    return found


# What a description of a GPU says, each of them; see docs/guide/planning.md.
_DESCRIBED = (
    "memory_gib",
    "bf16_tflops",
    "fp32_tflops",
    "memory_gb_per_s",
    "processors",
    "gpus_per_host",
    "host_gb_per_s",
    "network_gb_per_s",
)


def described(values: dict[str, Any]) -> Device:
    """A GPU by its datasheet: "name" and a positive number for each of _DESCRIBED; what kernels reach is the H100's.

    Raises:
        ValueError: a figure is missing, is not positive, or is not known.
    """
    unknown = sorted(set(values) - {"name", *_DESCRIBED})
    if unknown:
        raise ValueError(f"a GPU has no {unknown[0]!r}; it has name, {', '.join(_DESCRIBED)}")
    name = values.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a word, got {name!r}")
    for key in _DESCRIBED:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{key} must be a number above 0, got {value!r}")
    inside, across, constants = _network(1e9 * values["host_gb_per_s"], 1e9 * values["network_gb_per_s"])
    told = f"as described for {name}"
    return replace(
        H100,
        name=name,
        memory_bytes=values["memory_gib"] * GIB,
        peak_flops=values["bf16_tflops"] * 1e12,
        other_flops=values["fp32_tflops"] * 1e12,
        other_source=f"{told}; share assumed as in bf16",
        peak_bytes_per_s=values["memory_gb_per_s"] * 1e9,
        processors=int(values["processors"]),
        per_node=int(values["gpus_per_host"]),
        inside=inside,
        across=across,
        constants=constants,
        sources=_H100_SOURCES
        | {
            "memory": f"{told}; {_FREE}",
            "flops": f"{told}; share assumed as measured on an H100",
            "bandwidth": f"{told}; share assumed as measured on an H100",
            "softmax": "share assumed as measured on an H100",
            "network": f"{told}; latencies are NCCL's defaults of lasp.exchange.cost",
        },
    )


# Dense bf16 matrix products, FLOP/s, from the vendors' datasheets, by what the driver calls the device. The first
# name that occurs in the driver's is taken.
_PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops(driver_name: str, precision: str) -> float | None:
    """The peak of a device in matrix products of "bf16" or "fp32", FLOP/s; None where no datasheet's figure is here.

    driver_name: as torch.cuda.get_device_name gives it.
    """
    if precision != "bf16":  # fp32 products run at one of several speeds, by a setting of PyTorch's
        return None
    return next((peak for name, peak in _PEAK_BF16.items() if name in driver_name), None)
