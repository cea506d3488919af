"""Every sort of kernel compiles ahead of time for devices that are not there, within what they have.

A clean compile is no pass: kernels beyond a device's shared memory compile all the same, some to a lone trap. All of
it is `make rest`'s, about 40 s a target; a sample is in every run, and with the oldest Triton in `make triton`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import triton

SCRIPT = Path(__file__).parent / "compile_ahead.py"
# Bytes that a thread may spill, by the compiler that the tests install; what is not named here spills nothing.
# Hopper is what the configurations are made for. What key gradients spill most is the short runs' sweep, which gathers
# the states before its segment: sums of two parts, so that heads that forget keep their gradient, take four registers
# more, and intervals whose length a program finds out two. collect_kernel, of peer exchanges of matrix transitions
# alone, reads what all ranks wrote at once.
COMPILER = "3.7"
SPILLS = {
    "cuda:90": {
        "channel_bounded_intra_chunk_kernel": 96,
        "channel_intra_chunk_kernel": 640,
        "channel_prepare_kernel": 128,
        "query_gradient_kernel": 72,
        "gate_gradient_kernel": 8,
        "group_hopper_values_kernel": 8,
        "group_keys_kernel": 16,
        "key_gradient_kernel": 144,
        "collect_kernel": 80,
        "output_kernel": 256,
        "output_kernel of wide heads": 336,
        "delta_hopper_output_kernel of wide heads": 128,
        "delta_hopper_chunk_gradients_kernel of wide heads": 32,
    },
    "cuda:100": {
        "delta_output_kernel of wide heads": 104,
        "convolution_gradient_kernel": 24,
        "gated_norm_gradient_kernel": 8,
        "channel_bounded_intra_chunk_kernel": 192,
        "channel_bounded_prepare_kernel": 64,
        "channel_intra_chunk_kernel": 768,
        "channel_prepare_kernel": 640,
        "channel_summary_kernel": 96,
        "output_kernel": 80,  # in fp32
        "query_gradient_kernel": 72,
        "key_gradient_kernel": 184,
    },
    "cuda:80": {
        "delta_output_kernel": 280,
        "delta_output_kernel of wide heads": 160,
        "delta_gradients_kernel of wide heads": 256,
        "channel_bounded_intra_chunk_kernel": 288,
        "channel_bounded_prepare_kernel": 32,
        "channel_intra_chunk_kernel": 608,
        "channel_prepare_kernel": 128,
        "output_kernel": 256,
        "output_kernel of wide heads": 32,
        "channel_output_kernel": 16,
        "channel_key_inter_chunk_kernel": 16,
        "query_gradient_kernel": 112,
        "gate_pairs_kernel": 48,
        "value_gradient_kernel": 64,
        "key_gradient_kernel": 88,
    },
    "hip:gfx942": {
        "delta_output_kernel": 704,
        "delta_output_kernel of wide heads": 1864,
        "delta_gradients_kernel of wide heads": 204,
        "channel_intra_chunk_kernel": 256,
        "output_kernel": 244,
        "output_kernel of wide heads": 400,
        "channel_key_inter_chunk_kernel": 56,
        "query_gradient_kernel": 8,  # outside of its loop over chunks
        "key_gradient_kernel": 48,
        "value_gradient_kernel of wide heads": 820,  # in fp32, by vector instructions
        "key_value_gradient_kernel of wide heads": 820,
    },
}

SAMPLED = ("output_kernel", "key_gradient_kernel", "channel_intra_chunk_kernel")
PEERS = ("push_kernel", "fold_kernel", "collect_kernel")


def compile_ahead(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "error" not in report, report
        assert report["shared"] <= report["limit"], report
        if report["kernel"] in PEERS:  # whose assertions are traps
            assert report["ordered"], report
        else:
            assert (report["matrix_instructions"] > 0) == report["products"] and not report["trap"], report
        if triton.__version__.startswith(COMPILER):
            assert report["spilled_bytes"] <= SPILLS[report["target"]].get(report["kernel"], 0), report


def check_read(reports: list[dict[str, Any]], at_least: int) -> None:
    *refused, control, read = reports
    assert not refused and control["kernel"] == "changing_kernel" and read["parsed"] > at_least


@pytest.mark.exhaustive
def test_a_sample_is_read_and_compiled() -> None:
    """Triton's language has rules that the interpreter does not know. For other versions of it (`make triton`)."""
    reports = compile_ahead("--sample", "parse", "cuda:90")
    compiled = [report for report in reports if "target" in report]
    check_read(reports[: -len(compiled)], 80)
    assert {report["kernel"] for report in compiled} == {*PEERS, *SAMPLED}
    check(compiled)


@pytest.mark.ci
@pytest.mark.parametrize("target", SPILLS)
def test_compiles_within_the_device(target: str) -> None:
    reports = compile_ahead(target)
    # Heads that share q and k take two fewer where they have their own.
    assert Counter(report["target"] for report in reports) == {target: 34 if target == "cuda:90" else 36}
    check(reports)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", SPILLS)
def test_every_kernel_fits_the_device(target: str) -> None:
    for report in compile_ahead(target, "--every"):
        assert "error" not in report and not report["trap"] and report["shared"] <= report["limit"], report
        if not report["kernel"].startswith("delta"):  # right there, and faster than what does not spill
            # ptxas has given up on registers, and such a sweep was wrong.
            assert not (report.get("registers") == 32 and report["spilled_bytes"]), report


@pytest.mark.exhaustive
def test_triton_takes_what_every_call_launches() -> None:
    check_read(compile_ahead("parse"), 1000)
