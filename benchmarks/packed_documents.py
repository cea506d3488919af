"""Speed and memory of packed documents by their length, on one GPU: forward and backward of `lasp.linear_attention`.

    python benchmarks/packed_documents.py --output benchmarks/results

One sequence of 65,536 tokens, 16 heads of 128, bf16, cut into documents of equal length. The first row is the same
sequence as one document. Times are medians; memory is what a call needs beyond its inputs, outputs and gradients
included. A length that does not fit into the device's memory says so.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from kernels import inputs, milliseconds, peak_bytes, wanted_gradients
from outputs import folder

import lasp

SHAPE = (1, 65536, 16, 128)
LENGTHS = (65536, 8192, 2048, 512, 128, 32)
KINDS = ("constant", "scalar", "channel")


def measure(kind: str, length: int, backend: str) -> dict[str, Any]:
    x = inputs(SHAPE, kind)
    bounds = torch.arange(0, SHAPE[1] + 1, length)

    def step() -> tuple[torch.Tensor, ...]:
        o, _ = lasp.linear_attention(x["q"], x["k"], x["v"], x["g"], cu_seqlens=bounds, backend=backend)
        return torch.autograd.grad(o, wanted_gradients(x), x["d_o"])

    row: dict[str, Any] = {"kind": kind, "document_tokens": length, "backend": backend}
    try:
        return row | {"both_ms": milliseconds(step), "peak_gib": peak_bytes(step) / 2**30}
    except torch.cuda.OutOfMemoryError:
        return row | {"error": "out of memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--output", type=folder)
    options = parser.parse_args()

    device = torch.cuda.get_device_name()
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "shape": SHAPE, "rows": []}
    print(f"{device}, {SHAPE}\n{'decay':10}{'backend':9}{'tokens a document':>18}{'both ms':>10}{'peak GiB':>10}")
    for kind in options.kinds:
        for backend in options.backends:
            for length in options.lengths:
                row = measure(kind, length, backend)
                torch.cuda.empty_cache()
                result["rows"].append(row)
                figures = row.get("error") or f"{row['both_ms']['median']:10.3f}{row['peak_gib']:10.2f}"
                print(f"{kind:10}{backend:9}{length:>18}{figures}", flush=True)
    if options.output is not None:
        name = f"packed-documents-{device.replace(' ', '-').lower()}.json"
        (options.output / name).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
