"""Limits of a GPU, for which launches are made."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
import triton

from lasp.kernels.limits import FUSED_CAPABILITY
from lasp.kernels.triton.common.program import load_chunk


class DeviceLimits(NamedTuple):
    """Multiprocessors, bytes of shared memory that a program may have, whether it is of NVIDIA's Hopper generation."""

    processors: int
    shared_bytes: int
    hopper: bool


GLUON_VERSIONS = ("3.6.", "3.7.1")  # whose binaries of the kernels have run on a GPU
INTERPRETED = DeviceLimits(4, 1 << 20, True)

_devices: dict[torch.device, DeviceLimits] = {}


def ready_to_interpret() -> None:
    """Load what Triton would load at the first launch, when `print` stands for one of its functions.

    It asks for that function's signature, and in Python 3.10 `print` has none.
    """
    importlib.import_module("triton.experimental.gluon")


def interprets() -> bool:
    """Return whether kernels are interpreted, and not compiled."""
    return not isinstance(load_chunk, triton.JITFunction)


def takes_gluon() -> bool:
    """Return whether this Triton compiles kernels in its lower language, which changes from version to version."""
    return triton.__version__.startswith(GLUON_VERSIONS) and not interprets()


def device_limits(device: torch.device) -> DeviceLimits:
    """Return a GPU's limits; for the interpreter a few processors.

    Raises:
        ValueError: Triton cannot run there.
    """
    if device not in _devices:
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            if torch.version.hip is None and properties.major < FUSED_CAPABILITY:
                raise ValueError(
                    f"backend 'triton' takes GPUs of compute capability {FUSED_CAPABILITY}.0 and more, {device} has "
                    f"{properties.major}.{properties.minor}; use backend='torch'"
                )
            # AMD's properties lack the second; its devices have 64 KB.
            shared = getattr(properties, "shared_memory_per_block_optin", 65536)
            hopper = torch.version.hip is None and properties.major == 9
            _devices[device] = DeviceLimits(properties.multi_processor_count, shared, hopper)
        elif interprets():
            ready_to_interpret()
            _devices[device] = INTERPRETED
        else:
            raise ValueError(
                f"backend 'triton' runs on a GPU (or on CPU under TRITON_INTERPRET=1), got tensors on {device}; "
                "use backend='torch'"
            )
    return _devices[device]
