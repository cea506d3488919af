"""Compiles the kernels for a device that need not be there, and reports what they need.

    python tests/kernels/triton/compile_ahead.py cuda:90 [cuda:80 cuda:100 hip:gfx942 ...]

Prints one JSON object a line: kernel, target, shared memory, spilled bytes per thread (CUDA below sm_100), matrix
instructions, whether it orders memory with other devices. A script of its own: where the tests run in the interpreter,
kernels cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lasp.kernels.triton.decay.channel_mild_prepare import channel_mild_prepare_kernel
from lasp.kernels.triton.decay.channel_mild_within import channel_mild_within_kernel
from lasp.kernels.triton.decay.channel_output import channel_output_kernel
from lasp.kernels.triton.decay.channel_prepare import channel_prepare_kernel
from lasp.kernels.triton.decay.channel_reads import channel_key_reads_kernel
from lasp.kernels.triton.decay.channel_summary import channel_summary_kernel
from lasp.kernels.triton.decay.channel_within import channel_within_kernel
from lasp.kernels.triton.decay.gates import CHANNEL, HEAD, TOKEN
from lasp.kernels.triton.decay.key_gradient import key_gradient_kernel
from lasp.kernels.triton.decay.output import output_kernel
from lasp.kernels.triton.decay.plan import Plan, Tiles, plan, tile
from lasp.kernels.triton.decay.summary import summary_kernel
from lasp.kernels.triton.decay.work import BASE_LEVELS
from lasp.kernels.triton.peer.kernels import collect_kernel, fold_kernel, push_kernel
from lasp.kernels.triton.peer.memory import BLOCK, WARPS

INPUTS = {
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "o_ptr",
    "do_ptr",
    "dk_ptr",
    "dv_ptr",
    "scores_ptr",
    "from_start_ptr",
    "to_end_ptr",
    "read_q_ptr",
    "read_k_ptr",
    "dq_ptr",
}
DTYPE, NAME = torch.bfloat16, "bf16"
# Shared memory a program may have, in bytes.
LIMITS = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}


def target_of(name: str) -> GPUTarget:
    kind, architecture = name.split(":")
    return GPUTarget("cuda", int(architecture), 32) if kind == "cuda" else GPUTarget("hip", architecture, 64)


def kernels(dim: int, shared_limit: int) -> Iterator[tuple[Any, dict[str, Any], Tiles]]:
    """One kernel of each sort with its constants and launch, for K = V = dim."""
    padded = tile(dim, DTYPE)

    def planned(kind: int, tokens: int = 65536, from_zero: bool = False) -> tuple[Plan, dict[str, Any]]:
        p = plan(tokens, 16, dim, dim, DTYPE, kind, 132, shared_limit, from_zero)
        return p, {"K": dim, "V": dim, "C": p.chunk, "DESCRIPTORS": p.descriptors, "PACKED": False} | {
            "PRECISION": p.precision
        }

    p, common = planned(HEAD.value)
    common |= {"BK": padded, "KIND": HEAD.value}
    ways = {"REVERSE": False, "BACKWARDS": True, "WEIGH_K": False, "TOTAL": False, "EXACT": False}
    yield summary_kernel, common | ways | {"BV": p.summary.columns}, p.summary
    read, from_zero = {"EXACT": False, "LEARNED": False, "GATHER": False}, {"state_in_ptr": None}
    yield output_kernel, common | read | {"BV": p.values.columns} | from_zero, p.values
    p, common = planned(CHANNEL.value)
    for tiles, prepared in ((p.channels, False), (p.prepared_channels, True)):
        ways = {"REVERSE": False, "TOTAL": False, "PREPARED": prepared}
        yield channel_summary_kernel, common | ways | {"BK": tiles.columns, "BV": padded}, tiles
    whole, columns = {"WHOLE": False}, {"BK": padded, "BV": p.channel_values.columns}
    yield channel_output_kernel, common | whole | columns | from_zero, p.channel_values
    yield channel_key_reads_kernel, common | whole | {"BK": p.channel_reads.columns, "BV": padded}, p.channel_reads
    levels = {"BASE": BASE_LEVELS, "LEVELS": p.chunk.bit_length() - 1, "STEEP": True}
    common |= {"BK": p.channel_within.columns, "BV": padded}
    del common["DESCRIPTORS"]
    yield channel_mild_within_kernel, common, p.channel_within
    yield channel_within_kernel, common | levels, p.channel_within
    common = {name: value for name, value in common.items() if name not in ("V", "BV")}
    common |= {"BK": p.channel_prepare.columns}
    yield channel_mild_prepare_kernel, common, p.channel_prepare
    yield channel_prepare_kernel, common | levels, p.channel_prepare
    for tokens in (65536, 512):
        p, common = planned(TOKEN.value, tokens, from_zero=True)
        common |= {"KIND": TOKEN.value, "EXACT": False, "GATHER": p.gathers}
        yield output_kernel, common | {"LEARNED": True, "BK": padded, "BV": p.values.columns} | from_zero, p.values
        gradient = {"BK": p.scalar_keys.columns, "BV": padded, "SUMS": True, "ROWS": p.rows, "FROM_ZERO": True}
        yield key_gradient_kernel, common | gradient, p.scalar_keys


def peer_kernels() -> Iterator[tuple[Any, dict[str, Any], Tiles]]:
    """Those that write into other devices' memory, for decays per head."""
    common, tiles = {"SIZE": 8, "BLOCK": BLOCK}, Tiles(BLOCK, WARPS, 1)
    yield push_kernel, common | {"EVEN": True}, tiles
    fold = {"EVEN": True, "EACH": 128 * 128, "REVERSE": False, "FROM_ZERO": True, "EXACT": True, "total_ptr": None}
    yield fold_kernel, common | fold, tiles
    yield collect_kernel, common, tiles


def needs(
    kernel: Any, constants: dict[str, Any], tiles: Tiles, target: GPUTarget, wide: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """wide: inputs and outputs that are fp32, as gradients of q and k of grouped heads are."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            others = {
                "stretches_ptr": "*fp16",
                "places_ptr": "*i32",
                "steep_ptr": "*i32",
                "memories_ptr": "*i64",
                "epoch_ptr": "*i32",
            }
            signature[name] = f"*{NAME}" if name in INPUTS - wide else others.get(name, "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=target, options=options)
    report = {"kernel": kernel.__name__, "tiles": tuple(tiles), "shared": compiled.metadata.shared}
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for kernel, constants, tiles in (*kernels(128, LIMITS[name]), *peer_kernels()):
            report = {"target": name, "limit": LIMITS[name]}
            try:
                report |= needs(kernel, constants, tiles, target_of(name))
                if constants.get("ROWS"):
                    grouped = needs(kernel, constants, tiles, target_of(name), frozenset({"dk_ptr"}))
                    report |= {
                        key: max(report[key], grouped[key]) for key in ("shared", "spilled_bytes") if key in report
                    }
            except RuntimeError as error:
                report |= {"kernel": kernel.__name__, "error": str(error)}
            print(json.dumps(report), flush=True)
