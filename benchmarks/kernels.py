"""Speed, memory and error of the decay family's and the delta rule's kernels beside their peers, in one run on one GPU.

    python benchmarks/kernels.py --output benchmarks/results            # this library and softmax attention
    python benchmarks/kernels.py --peers fla --shapes main              # and flash-linear-attention, if installed
    python benchmarks/kernels.py --forgetting scalar channel             # what gates that forget cost, alone
    python benchmarks/kernels.py --kinds delta "gated delta" kda --shapes main --name delta-kernels --peers fla flashqla

flash-linear-attention (`pip install flash-linear-attention`) refuses gated kernels on Hopper with Triton before 3.7.1.
FlashQLA is Gated DeltaNet alone (`baselines/delta.py` says what to install); it compiles for minutes.

Every figure goes into one JSON file; `benchmarks/kernels_report.py` makes tables and plots of docs/results/kernels.md.
Times are medians over repetitions of calls queued without waiting (so that the host hides behind the GPU, where it
can), fresh gradients each time. "graph" times replay a CUDA graph: kernels alone. Peak memory is what a call needs
beyond its inputs, its outputs and gradients included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peer_tuning
import torch
from baselines import delta
from torch import Tensor
from torch.nn.functional import normalize

import lasp

SHAPES = {
    "main": (1, 65536, 16, 128),
    "batch": (4, 16384, 16, 64),
    "short": (1, 16384, 16, 128),
    "long": (1, 131072, 16, 128),
    "wide": (1, 32768, 8, 256),
    "few heads": (1, 65536, 4, 128),
}
KINDS = ("constant", "scalar", "channel")
DELTA_KINDS = ("delta", "gated delta", "kda")
# Where the delta rule's triangular systems are hard: keys alike, or the same several times in a row; beta up to 2.
DELTA_CASES = ("random", "beta to 2", "cosine 0.8", "runs of equal keys", "never forgets")
CROSSOVER_TOKENS = (512, 1024, 2048, 4096, 8192)
SLOWEST_DECAY = 0.02
# Strongest log-decays of heads: on average a chunk keeps 2^-0.1, 2^-0.9, 2^-2.8 or 2^-6.9 of a state. The more it
# forgets, the shorter are the intervals of a gate's gradient.
FORGETTING = (0.002, 0.02, 0.06, 0.15)
FORGETTING_ROUNDS = 6


def inputs(
    shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype = torch.bfloat16, strongest: float = SLOWEST_DECAY
) -> dict[str, Tensor]:
    """q, k, v, d_o [B, T, H, D] and g, uniform down to -strongest; all but d_o and a constant g want gradients."""
    if kind in DELTA_KINDS:
        return delta_inputs(shape, kind, dtype, strongest)
    B, T, H, D = shape
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v, d_o = (torch.randn(B, T, H, D, device="cuda", generator=random).to(dtype) for _ in range(4))
    gate_shape = {"constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, D)}[kind]
    g = -strongest * torch.rand(gate_shape, device="cuda", generator=random)
    wanted = (q, k, v) if kind == "constant" else (q, k, v, g)
    for tensor in wanted:
        tensor.requires_grad_()
    return {"q": q, "k": k, "v": v, "g": g, "d_o": d_o}


def delta_inputs(
    shape: tuple[int, int, int, int],
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
    strongest: float = SLOWEST_DECAY,
    case: str = "random",
) -> dict[str, Tensor]:
    """Inputs as above, with beta, and q and k of length 1; case: one of DELTA_CASES."""
    B, T, H, D = shape
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v, d_o = (torch.randn(B, T, H, D, device="cuda", generator=random) for _ in range(4))
    if case == "cosine 0.8":
        k = 0.5 * k / D**0.5 + normalize(torch.randn(B, 1, H, D, device="cuda", generator=random), dim=-1)
    if case == "runs of equal keys":
        k = k[:, ::8].repeat_interleave(8, 1)[:, :T]
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    x = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    x["beta"] = (2.0 if case == "beta to 2" else 1.0) * torch.rand(B, T, H, device="cuda", generator=random)
    if kind != "delta":
        size = torch.rand(*((B, T, H, D) if kind == "kda" else (B, T, H)), device="cuda", generator=random)
        x["g"] = -(0.0 if case == "never forgets" else strongest) * size
    for tensor in x.values():
        tensor.requires_grad_()
    return x | {"d_o": d_o.to(dtype)}


def ours(x: dict[str, Tensor]) -> Tensor:
    if "beta" in x:
        return lasp.delta_rule(x["q"], x["k"], x["v"], x["beta"], x.get("g"), backend="triton")[0]
    return lasp.linear_attention(x["q"], x["k"], x["v"], x["g"], backend="triton")[0]


def fla(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if "beta" in x:
        return fla_delta(x)
    q, k, v, g = x["q"], x["k"], x["v"], x["g"]
    if g.dim() == 4:
        return chunk_gla(q, k, v, g=g)[0]
    if g.dim() == 1:
        return chunk_simple_gla(q, k, v, g_gamma=g)[0]
    return chunk_simple_gla(q, k, v, g=g)[0]


def fla_delta(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    given = {name: x[name] for name in ("q", "k", "v", "beta", "g") if name in x}
    if "g" not in x:
        return chunk_delta_rule(**given)[0]
    return (chunk_kda if x["g"].dim() == 4 else chunk_gated_delta_rule)(**given)[0]


def flashqla(x: dict[str, Tensor], bounds: Sequence[int] | None = None) -> Tensor:
    if "beta" not in x or "g" not in x or x["g"].dim() == 4:
        raise ValueError("FlashQLA is Gated DeltaNet alone")
    return delta.flashqla(x["q"], x["k"], x["v"], x["beta"], x["g"], bounds)


def softmax(x: dict[str, Tensor]) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"lasp": ours, "fla": fla, "flashqla": flashqla}


def wanted_gradients(x: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in x.values() if tensor.requires_grad]


def step(call: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(x), wanted_gradients(x), x["d_o"])


def milliseconds(function: Callable[[], Any], repetitions: int = 9, calls: int = 3) -> dict[str, float]:
    for _ in range(2):
        function()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """Returns the replay of a CUDA graph of `function`: its kernels alone."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def graph_milliseconds(function: Callable[[], Any]) -> dict[str, float]:
    return milliseconds(captured(function))


def peak_bytes(function: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def copy_bytes_per_second() -> float:
    """Bytes read plus bytes written, of a large copy."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source))["median"] / 1e3)


def floor_milliseconds(shape: tuple[int, int, int, int], kind: str, rate: float) -> dict[str, float]:
    """Each input read once, each output written once: o from q, k, v, g; then the gradients from those and d_o."""
    B, T, H, D = shape
    tile, head = 2 * B * T * H * D, 4 * B * T * H
    gate = {"constant": 0, "delta": head, "scalar": head, "gated delta": 2 * head}.get(kind, head * D)
    return {"forward": 1e3 * (4 * tile + gate) / rate, "both": 1e3 * (11 * tile + 3 * gate) / rate}


def errors(
    kind: str, call: Callable[[dict[str, Tensor]], Tensor], tokens: int = 4096, case: str = "random"
) -> dict[str, float]:
    """||x - reference|| / ||reference|| against the chunked PyTorch backend in fp64."""
    shape = (1, tokens, 2, 128)
    x = delta_inputs(shape, kind, case=case) if kind in DELTA_KINDS else inputs(shape, kind)
    exact = {name: tensor.detach().double() for name, tensor in x.items()}
    for name, tensor in x.items():
        exact[name].requires_grad_(tensor.requires_grad)
    names = ["o"] + [f"d{name}" for name, tensor in x.items() if tensor.requires_grad]
    o = call(x)
    values = (o, *torch.autograd.grad(o, wanted_gradients(x), x["d_o"]))
    if "beta" in x:
        given = (exact["q"], exact["k"], exact["v"], exact["beta"], exact.get("g"))
        reference_o = lasp.delta_rule(*given, backend="torch")[0]
    else:
        reference_o = lasp.linear_attention(exact["q"], exact["k"], exact["v"], exact["g"], backend="torch")[0]
    references = (reference_o, *torch.autograd.grad(reference_o, wanted_gradients(exact), exact["d_o"]))
    return {
        name: ((value.detach().double() - reference.detach()).norm() / reference.detach().norm()).item()
        for name, value, reference in zip(names, values, references, strict=True)
    }


def cold_start_seconds(implementation: str, kind: str) -> float:
    """Time from an empty kernel cache to the first gradients, in a process of its own, imports not counted."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import torch, kernels as b;"
        "x = b.inputs(b.SHAPES['main'], sys.argv[3]); torch.cuda.synchronize(); start = time.perf_counter();"
        "b.step(b.IMPLEMENTATIONS[sys.argv[2]], x); torch.cuda.synchronize(); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", code, str(Path(__file__).parent), implementation, kind]
        done = subprocess.run(
            command, env=os.environ | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=True
        )
    return float(done.stdout.split()[-1])


def crossover() -> list[dict[str, Any]]:
    """Kernels alone, H = 16, D = 128: constant decay and cuDNN's causal softmax attention by length."""
    rows = []
    for tokens in CROSSOVER_TOKENS:
        x = inputs((1, tokens, 16, 128), "constant")
        x["g"] = x["g"].detach()
        row: dict[str, Any] = {"tokens": tokens}
        for name, call in (("lasp", ours), ("softmax", softmax)):
            row[name] = {
                "forward": graph_milliseconds(partial(call, x)),
                "both": graph_milliseconds(partial(step, call, x)),
            }
        rows.append(row)
    return rows


def forgetting(kind: str) -> list[dict[str, Any]]:
    """Least milliseconds of the kernels alone, in turns, by heads' strongest log-decay; last of heads of every one."""
    replays: list[dict[str, Callable[[], None]]] = []
    read = []  # by replays, which do not hold it
    cases = [*((strongest,) * 4 for strongest in FORGETTING), FORGETTING]
    for case in cases:
        x = inputs(SHAPES["main"], kind)
        with torch.no_grad():
            heads = torch.tensor(case, device="cuda").repeat(x["q"].shape[2] // len(case))
            x["g"] *= heads.view(-1, *[1] * (x["g"].dim() - 3)) / SLOWEST_DECAY
        detached = {name: tensor.detach() for name, tensor in x.items()}
        read.append(x)
        replays.append({"forward": captured(partial(ours, detached)), "both": captured(partial(step, ours, x))})
    times: list[dict[str, list[float]]] = [{"forward": [], "both": []} for _ in cases]
    for _ in range(FORGETTING_ROUNDS):
        for replay, found in zip(replays, times, strict=True):
            for part, milliseconds_of in found.items():
                milliseconds_of.append(milliseconds(replay[part])["min"])
    return [
        {"kind": kind, "strongest": sorted(set(case)), **{part: min(each) for part, each in found.items()}}
        for case, found in zip(cases, times, strict=True)
    ]


def measure(implementation: str, shape: tuple[int, int, int, int], kind: str) -> dict[str, Any]:
    call, x = IMPLEMENTATIONS[implementation], inputs(shape, kind)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(x)

    row: dict[str, Any] = {"forward": milliseconds(forward), "both": milliseconds(lambda: step(call, x))}
    if implementation == "lasp":
        row["graph"] = {"forward": graph_milliseconds(forward), "both": graph_milliseconds(lambda: step(call, x))}
    return row | {
        "peak_gib": peak_bytes(lambda: step(call, x)) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *DELTA_KINDS), default=list(KINDS))
    parser.add_argument("--peers", nargs="*", choices=("fla", "flashqla"), default=[])
    parser.add_argument("--only-speed", action="store_true", help="no errors, cold start or crossover")
    parser.add_argument("--forgetting", nargs="+", choices=("scalar", "channel"), help="these kinds, and nothing else")
    parser.add_argument("--name", default="kernels")
    options = parser.parse_args()

    import triton

    device = torch.cuda.get_device_name()
    rate = copy_bytes_per_second()
    result: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_tb_per_s": rate / 1e12,
        "rows": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"{options.name}{'-forgetting' if options.forgetting else ''}-{device.replace(' ', '-').lower()}.json"
    path = options.output / name
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, copy {rate / 1e12:.2f} TB/s")
    for kind in options.forgetting or ():
        for of_gates in forgetting(kind):
            result["rows"].append(of_gates)
            path.write_text(json.dumps(result, indent=1))
            print(f"{kind:10}{of_gates['strongest']!s:28}{of_gates['forward']:9.3f}{of_gates['both']:9.3f}", flush=True)
    if options.forgetting:
        return
    if "fla" in options.peers:
        peer_tuning.compile_all("fla", options.shapes, options.kinds)
    print(f"{'shape':26}{'decay':10}{'':6}{'forward':>9}{'floor':>8}{'both':>9}{'floor':>8}{'peak GiB':>10}")
    for shape in (SHAPES[name] for name in options.shapes):
        for kind in options.kinds:
            for implementation in ("lasp", *options.peers):
                row: dict[str, Any] = {"shape": shape, "kind": kind, "implementation": implementation}
                row["floor"] = floor_milliseconds(shape, kind, rate)
                try:
                    row |= measure(implementation, shape, kind)
                except Exception as error:  # a peer that refuses is a result
                    if implementation == "lasp":
                        raise
                    row["error"] = str(error)[:200]
                result["rows"].append(row)
                path.write_text(json.dumps(result, indent=1))
                if "error" in row:
                    print(f"{shape!s:26}{kind:10}{implementation:6}{row['error'][:60]}", flush=True)
                    continue
                print(
                    f"{shape!s:26}{kind:10}{implementation:6}{row['forward']['median']:9.3f}{row['floor']['forward']:8.3f}"
                    f"{row['both']['median']:9.3f}{row['floor']['both']:8.3f}{row['peak_gib']:10.2f}"
                    + "".join(f"  graph {part} {ms['median']:.3f}" for part, ms in row.get("graph", {}).items()),
                    flush=True,
                )
    if not options.only_speed:
        result["errors"] = {
            implementation: {kind: errors(kind, IMPLEMENTATIONS[implementation]) for kind in options.kinds}
            for implementation in ("lasp", *options.peers)
        }
        hard = [kind for kind in options.kinds if kind in DELTA_KINDS]
        result["hard_errors"] = {
            implementation: {
                kind: {case: errors(kind, IMPLEMENTATIONS[implementation], case=case) for case in DELTA_CASES}
                for kind in hard
            }
            for implementation in ("lasp", *options.peers)
        }
        print("errors", json.dumps(result["errors"]), json.dumps(result["hard_errors"]))
        result["crossover"] = crossover()
        for row in result["crossover"]:
            times = (
                f"{name} {row[name]['forward']['median']:.3f} {row[name]['both']['median']:.3f}"
                for name in ("lasp", "softmax")
            )
            print(row["tokens"], *times)
        result["cold_start_s"] = {kind: cold_start_seconds("lasp", kind) for kind in options.kinds if kind != "scalar"}
        print("cold start s", result["cold_start_s"])
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
