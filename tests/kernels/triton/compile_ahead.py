"""Compiles what calls launch for a device that need not be there, and reports what it needs.

    python tests/kernels/triton/compile_ahead.py [--sample | --every] [parse] [cuda:90 ...]

Calls are made with tensors that have shapes and no data, and their launches recorded instead of done. For devices that
are named, cuda:80, cuda:90, cuda:100 or hip:gfx942, one kernel of each sort is compiled (--sample: of a few; --every:
all kinds of decay and dtypes, dims of 128 and 256), and a JSON object printed for each: shared memory, spilled bytes
per thread, matrix instructions, whether it orders memory with other devices. `parse` takes every kind of call
(--sample: three or four launches of a kernel), but no kernel further than through Triton's own language, whose rules
the interpreter does not know: it prints what was refused, a control at the last, and how many were read. A script of
its own: where tests run in the interpreter, kernels cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource

import lasp
from lasp.exchange.peer.kernels import collect_kernel, fold_kernel, push_kernel
from lasp.exchange.peer.memory import BLOCK, WARPS
from lasp.kernels.limits import WIDE_CHANNELS_SHARED_BYTES
from lasp.kernels.triton.common import device as devices
from lasp.kernels.triton.common.device import DeviceLimits
from lasp.kernels.triton.common.launch import BoundKernel
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.delta import launches as delta_launches
from lasp.kernels.triton.loss import launches as losses
from lasp.kernels.triton.neighbours import launches
from lasp.ops import checks
from lasp.sequence import arguments

TYPES_OF_INPUTS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TYPES = TYPES_OF_INPUTS | {torch.int32: "*i32", torch.int64: "*i64"}
META = torch.device("meta")
# Shared memory a program may have, in bytes.
LIMITS = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}


class Call(NamedTuple):
    kind: str
    T: int = 65536
    H: int = 16
    D: int = 128
    dtype: torch.dtype = torch.bfloat16
    learned: bool = False
    initial: bool = False
    final: bool = False
    packed: bool = False
    delta: bool = False  # the delta rule, or linear attention
    erases: bool = False  # with a key of its own
    weighs: bool = False  # with weights of tokens, and skips
    V: int = 0  # D if 0


class Compilable(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, type_ in enumerate(self.signature.values())
            if type_.startswith("*")
        }
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return source(fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=attributes)


def target_of(name: str) -> GPUTarget:
    kind, architecture = name.split(":")
    return GPUTarget("cuda", int(architecture), 32) if kind == "cuda" else GPUTarget("hip", architecture, 64)


def launched(calls: Iterable[Any], target: str, make: Callable[[Any], None] | None = None) -> list[Compilable]:
    """Returns what calls, forward and backward, launch on such a device of 132 processors: each once."""
    found: dict[str, Compilable] = {}

    def record(launch: BoundKernel, tensors: dict[str, Tensor | None]) -> None:
        signature, constants = {}, {}
        assert set(tensors) == set(launch.tensors)
        for parameter in launch.kernel.params:
            value = {**tensors, **launch.fixed}[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        kernel = Compilable(launch.kernel, signature, constants, launch.options)
        found[f"{launch.kernel.__name__} {kernel[1:]}"] = kernel

    def check_tensor(name: str, value: object, form: str) -> None:
        """Public functions refuse tensors without numbers, and launches recorded need none."""

    runs.launches_of.cache_clear()
    delta_launches._launches.cache_clear()
    device = DeviceLimits(132, LIMITS[target], target == "cuda:90")
    with ExitStack() as stack:
        stack.enter_context(patch.object(BoundKernel, "run", record))
        # Autocast knows no such device.
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device: False))
        stack.enter_context(patch.dict(devices._devices, {META: device}))
        # Not taken with every Triton that compiles them.
        stack.enter_context(patch.object(delta_launches, "takes_gluon", lambda: True))
        for module in (arguments, checks):
            stack.enter_context(patch.object(module, "check_tensor", check_tensor))
        for call in calls:
            (make or attend)(call)
    return list(found.values())


def attend(call: Call) -> None:
    T, H, D, H_v, V, runs = call.T, call.H, call.D, 16, call.V or call.D, 2 if call.packed else 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META, requires_grad=wanted)

    q, k, v = (empty(1, T, heads, width, dtype=call.dtype) for heads, width in ((H, D), (H, D), (H_v, V)))
    gates = {"none": None, "constant": (H_v,), "scalar": (1, T, H_v), "channel": (1, T, H_v, D)}[call.kind]
    g = None if gates is None else empty(*gates, wanted=call.learned)
    state = empty(runs, H_v, D, V) if call.initial else None
    documents = (0, T // 3, T) if call.packed else None
    ways: dict[str, Any] = {
        "initial_state": state,
        "output_final_state": call.final,
        "cu_seqlens": documents,
        "backend": "triton",
    }
    if call.delta:
        erase_key = empty(1, T, H, D, dtype=call.dtype) if call.erases else None
        ways |= {"erase_key": erase_key, "normalize_qk": call.initial and not call.erases}
        o, final = lasp.delta_rule(q, k, v, empty(1, T, H_v), g, **ways)
    else:
        if call.weighs:
            ways |= {"log_weight": empty(1, T, H_v), "skip": empty(H_v)}
        o, final = lasp.linear_attention(q, k, v, g, **ways)
    (o.sum() + final.sum() if call.final else o.sum()).backward()


def around(dtype: torch.dtype) -> None:
    """Returns what mixers do beside their recurrence, of Mamba-2's and GLA's shapes, forward and backward."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    x, weight, bias, before = empty(1, 4096, 4352), empty(4352, 4), empty(4352), empty(1, 3, 4352)
    for silu, rows, begins in itertools.product((False, True), (None, before), (None, empty(4096, dtype=torch.int32))):
        parts = launches.convolve(x, weight, bias, rows, begins, silu, (4096, 128, 128))
        launches.convolve_gradients(parts, x, weight, None if silu else bias, rows, begins, silu)
    wide = empty(1, 4096, 64, 64)
    for gate, activation in ((wide, "silu"), (wide, "sigmoid"), (None, "none")):
        ways = (wide, gate, empty(512), 8, activation, False, 1e-5)
        launches.gated_norm(*ways)
        launches.gated_norm_gradients(wide, *ways, again=gate is not None)
    first = (wide, wide, empty(4096), 1, "silu", True, 1e-5)
    launches.gated_norm(*first)
    for again in (False, True):
        launches.gated_norm_gradients(wide, *first, again=again)
    for gradient in (False, True):
        losses.cross_entropy(empty(64, 50288), empty(64, dtype=torch.int64), -100, gradient=gradient)


def peer_kernels() -> Iterator[Compilable]:
    """Kernels that write into other devices' memory, for decays per head."""
    types = {"memories_ptr": "*i64", "epoch_ptr": "*i32"}
    common = {"SIZE": 8, "BLOCK": BLOCK, "EVEN": True}
    fold = {"EACH": 128 * 128, "REVERSE": False, "FROM_ZERO": True, "EXACT": True, "total_ptr": None}
    for kernel, constants in ((push_kernel, common), (fold_kernel, common | fold), (collect_kernel, common)):
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32") if name.endswith("_ptr") else "i32"
            for name in kernel.arg_names
        }
        yield Compilable(kernel, signature, constants, {"num_warps": WARPS, "num_stages": 1})


def needs(kernel: Compilable, target: GPUTarget) -> dict[str, Any]:
    compiled = triton.compile(kernel.source(), target=target, options=kernel.options)
    wide = " of wide heads" if kernel.constants.get("K", 0) > 128 else ""
    report = {"kernel": kernel.kernel.__name__ + wide, **kernel.options, "shared": compiled.metadata.shared}
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    written = compiled.asm["ttgir" if kernel.kernel.is_gluon() else "ttir"]
    products = [line for line in written.splitlines() if re.search(r"tt\.dot|warp_group_dot ", line)]
    if target.backend == "cuda":  # whose matrix units take no fp32 as it is
        products = [line for line in products if not re.search(r"xf32> \*", line) or re.search("tf32|bf16x", line)]
    report["products"] = bool(products)
    report["matrix_instructions"] = len(re.findall(r"wgmma|mma\.sync|tcgen05\.mma|mfma", text))
    report["ordered"] = bool(re.search(r"sys\.(acquire|release)|buffer_inv sc0 sc1|buffer_wbl2", text))
    report["trap"] = bool(re.search(r"^\s*(trap|s_trap)", text, re.MULTILINE))
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found:
            report |= {"registers": int(found[1]), "spilled_bytes": int(found[2])}
    elif found := re.search(r"vgpr_spill_count:\s+(\d+)", text):
        report["spilled_bytes"] = 4 * int(found[1])
    return report


# One of each sort of kernel: calls, and what is compiled of what they launch.
COMPILED = {
    Call("constant"): "summary|output",
    Call("scalar", learned=True): "output|query_gradient|key_gradient|gate_(gradient|pairs)",
    Call("scalar", learned=True, H=8): "key_gradient",  # fp32
    # Mamba-2's.
    Call("scalar", learned=True, H=1, V=64, weighs=True): (
        "summary|output|(query|key|value)_gradient|gate_(gradient|pairs)|"
        "group_(states|keys|gates|hopper_(pairs|values))"  # in the place of those, on Hopper
    ),
    Call("scalar", learned=True, T=512): "output|key_gradient",
    Call("scalar", learned=True, dtype=torch.float32): "output",
    Call("constant", D=256): "output",
    Call("constant", D=256, dtype=torch.float32): "key_value_gradient",
    Call("constant", D=256, H=8, dtype=torch.float32): "value_gradient",  # of shared keys, apart from dk
    # Of Hopper, which has its own, the sweep of gradients makes the states too.
    Call("none", delta=True): "delta_(output|states|hopper_output|hopper_gradients)",
    Call("scalar", learned=True, D=256, delta=True): "delta_(output|gradients|hopper_output|hopper_chunk_gradients)",
    Call("channel", learned=True): (
        "channel_(bounded_)?(prepare|intra_chunk)|channel_(summary|output|key_inter_chunk|through)"
    ),
}


# Those that come closest to what a device has, of each family.
SAMPLED = {Call("scalar", learned=True, T=512): "output|key_gradient", Call("channel"): "channel_intra_chunk"}


def one_of_each(target: str, wanted: dict[Call, str] = COMPILED) -> list[Compilable]:
    kernels = list(peer_kernels())
    for call, names in wanted.items():
        first = {kernel.kernel.__name__: kernel for kernel in reversed(launched([call], target))}
        kernels += [kernel for name, kernel in first.items() if re.fullmatch(f"({names})_kernel", name)]
    return kernels


def every_one(target: str) -> list[Compilable]:
    kinds = [("constant", False), ("scalar", False), ("channel", False)]
    kinds += [("none", True), ("scalar", True), ("channel", True)]
    cases = itertools.product(kinds, (128, 256), TYPES_OF_INPUTS)
    calls = [Call(kind, D=D, dtype=dtype, learned=True, delta=delta) for (kind, delta), D, dtype in cases]
    if LIMITS[target] < WIDE_CHANNELS_SHARED_BYTES:  # where these are refused
        calls.remove(Call("channel", D=256, learned=True, delta=True))
    return [*launched(calls, target), *launched(TYPES_OF_INPUTS, target, around)]


def compile_for(name: str, kernels: list[Compilable]) -> None:
    for kernel in kernels:
        report = {"target": name, "limit": LIMITS[name]}
        try:
            report |= needs(kernel, target_of(name))
        except RuntimeError as error:
            report |= {"kernel": kernel.kernel.__name__, "error": str(error)}
        print(json.dumps(report), flush=True)


@triton.jit
def changing_kernel(x_ptr, n):
    """The control: a variable that is something else after a branch."""
    x = n
    if n > 0:
        x = tl.arange(0, 16)
        tl.store(x_ptr + x, 1.0)


def every_call() -> list[Call]:
    ways = itertools.product((False, True), repeat=4)  # learned, initial, final, packed
    kinds, dims = ("none", "constant", "scalar", "channel"), ((16, 128), (4, 72))
    cases = itertools.product(TYPES_OF_INPUTS, ways, kinds, (65536, 512), dims)
    calls = [Call(kind, T, H, D, dtype, *way) for dtype, way, kind, T, (H, D) in cases]
    delta = [call._replace(delta=True) for call in calls if call.kind != "constant"]
    weighed = [call._replace(weighs=True) for call in calls if call.kind == "scalar"]
    return [*calls, *weighed, *delta, *(call._replace(erases=True) for call in delta if call.T == 512)]


def three_of_a_name(kernels: list[Compilable]) -> list[Compilable]:
    """The first, the last, and one between."""
    named: dict[str, list[Compilable]] = {}
    for kernel in kernels:
        named.setdefault(kernel.kernel.__name__, []).append(kernel)
    return [each for same in named.values() for each in same[:: max(1, (len(same) - 1) // 2)]]


def parse(kernels: list[Compilable]) -> None:
    kernels = [*kernels, Compilable(changing_kernel, {"x_ptr": "*fp32", "n": "i32"}, {}, {})]
    target = target_of("cuda:90")
    backend = make_backend(target)
    for kernel in kernels:
        options = backend.parse_options(dict(kernel.options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        implementation = backend.get_codegen_implementation(options)
        try:
            kernel.source().make_ir(target, options, implementation, backend.get_module_map(), context)
        except Exception as error:  # of which Triton has many kinds
            print(
                json.dumps({"kernel": kernel.kernel.__name__, "constants": str(kernel.constants), "error": str(error)})
            )
    print(json.dumps({"parsed": len(kernels)}))


if __name__ == "__main__":
    sample = "--sample" in sys.argv
    if "parse" in sys.argv:
        calls = every_call()
        kernels = three_of_a_name(launched(calls[::61], "cuda:90")) if sample else launched(calls, "cuda:90")
        parse([*kernels, *launched(TYPES_OF_INPUTS, "cuda:90", around)])
    wanted = SAMPLED if sample else COMPILED
    for name in LIMITS:
        if name in sys.argv:
            compile_for(name, every_one(name) if "--every" in sys.argv else one_of_each(name, wanted))
