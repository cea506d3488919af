"""Bytes that a rank receives for one attention layer, by method and length: counted, derived, and at scale.

    python -m benchmarks.volume            (about a minute on two cores)

Runs every method on gloo processes, forward and backward, and counts bytes at torch.distributed. Writes
benchmarks/results/<date>-cpu-volume.json and, from it alone, docs/img/volume.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STATE_METHODS = ("ring", "all_gather", "pipelined", "doubling", "all_to_all", "hierarchical", "reach")
TOKEN_METHODS = ("ring attention", "ulysses", "softmax, gathered", "megatron (one block)")
LENGTHS = (16, 64, 256, 1024)  # tokens a rank
HEADS, HEAD_DIM, WIDTH = 8, 16, 128
# At scale: one layer of a 1B model, 16-bit activations.
LARGE = {"ranks": 64, "heads": 64, "head_dim": 32, "width": 2048}
LARGE_LENGTHS = tuple(2**power for power in range(11, 23))


def methods(size: int) -> dict[str, Callable[[Any], Any]]:
    """A function of this rank's x [1, n, D] for each method, whose backward pass is the method's."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    import lasp
    from benchmarks.baselines.megatron import attention_block
    from benchmarks.baselines.ring import ring_attention
    from benchmarks.baselines.ulysses import ulysses

    group = dist.group.WORLD

    def softmax(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def linear(q: Any, k: Any, v: Any) -> Any:
        return lasp.linear_attention(q, k, v)[0]

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (HEADS, HEAD_DIM))

    def state(name: str) -> Callable[[Any], Any]:
        sp = lasp.SequenceParallel(group, exchange=name)
        return lambda x: lasp.linear_attention(heads(x), heads(x), heads(x), sp=sp)[0]

    sp = lasp.SequenceParallel(group)
    qkv = torch.ones(3 * WIDTH // size, WIDTH)
    out = torch.ones(WIDTH, WIDTH // size)
    return {name: state(name) for name in STATE_METHODS} | {
        "ring attention": lambda x: ring_attention(heads(x), heads(x), heads(x), group),
        "ulysses": lambda x: ulysses(linear, heads(x), heads(x), heads(x), group),
        "softmax, gathered": lambda x: lasp.softmax_attention(heads(x), heads(x), heads(x), sp=sp)[0],
        "megatron (one block)": lambda x: attention_block(softmax, x, qkv, out, HEADS // size, group),
    }


def counted(size: int) -> list[dict[str, Any]]:
    """The most that any of `size` ranks received, by method and length."""

    def work(rank: int) -> list[tuple[str, int, int]]:
        import torch

        from benchmarks.baselines.counter import counting

        rows = []
        for name, layer in methods(size).items():
            for tokens in LENGTHS:
                x = torch.randn(1, tokens, WIDTH, requires_grad=True)
                with counting() as count:
                    layer(x).sum().backward()
                rows.append((name, tokens, count.received_bytes))
        return rows

    ranks = run(size, work)
    return [
        {"method": rows[0][0], "tokens": rows[0][1] * size, "received_bytes": max(row[2] for row in rows)}
        for rows in zip(*ranks, strict=True)
    ]


def derived(method: str, tokens: int, size: int, heads: int, head_dim: int, width: int, itemsize: int) -> int:
    """The same by the formulas of lasp.analysis.volume; `tokens` of the whole sequence."""
    from lasp.analysis import volume
    from lasp.exchange import EXCHANGES, Payload

    shard = volume.ShardShape(
        batch=1, tokens=tokens // size, d_model=width, heads=heads, key_heads=heads, key_dim=head_dim,
        value_dim=head_dim, itemsize=itemsize,
    )  # fmt: skip
    if method in STATE_METHODS:
        load = Payload(heads, head_dim, head_dim, 0)
        nodes = (size,) if size <= 8 else (8,) * (size // 8)
        return max(
            volume.state_exchange(EXCHANGES[method](), load, position, nodes).step.received_bytes
            for position in range(size)
        )
    formulas: dict[str, Callable[..., volume.Volume]] = {
        "ring attention": volume.ring_attention,
        "ulysses": volume.ulysses,
        "softmax, gathered": volume.gathered_softmax,
        "megatron (one block)": lambda *place: volume.megatron(*place, blocks=1),
    }
    return max(formulas[method](shard, position, size).step.received_bytes for position in range(size))


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    names = [*STATE_METHODS, *TOKEN_METHODS]
    styles = {name: "-" if name in STATE_METHODS else "--" for name in names}
    colours = {name: plt.get_cmap("tab20")(index) for index, name in enumerate(names)}
    for axes, rows in ((left, record["counted"]), (right, record["large"])):
        curves: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            curves.setdefault(tuple(row["derived_bytes"] for row in rows if row["method"] == name), []).append(name)
        for same in curves.values():
            name = same[0]
            own = [row for row in rows if row["method"] == name]
            lengths = [row["tokens"] for row in own]
            axes.plot(
                lengths, [row["derived_bytes"] for row in own], styles[name], color=colours[name], label=", ".join(same)
            )
            if "received_bytes" in own[0]:
                axes.plot(lengths, [row["received_bytes"] for row in own], "o", color=colours[name], markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="tokens of the sequence")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    small, large = record["shape"], record["large_shape"]
    left.set_title(f"{small['ranks']} gloo processes: points counted, lines derived", fontsize=10)
    left.set_ylabel("bytes received by a rank, one layer, forward and backward")
    right.set_title(
        f"{large['ranks']} ranks, 8 a host, width {large['width']}, 16-bit activations: derived", fontsize=10
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--plot", type=Path, help="only draw the figure of this JSON file")
    arguments = parser.parse_args()
    image = ROOT / "docs" / "img" / "volume.png"
    if arguments.plot is not None:
        plot(json.loads(arguments.plot.read_text()), image)
        return
    import torch

    size = arguments.ranks
    rows = counted(size)
    for row in rows:
        row["derived_bytes"] = derived(row["method"], row["tokens"], size, HEADS, HEAD_DIM, WIDTH, 4)
        print(
            f"{row['method']:<22}{row['tokens']:>7} tokens {row['received_bytes']:>12,} B, "
            f"derived {row['derived_bytes']:>12,}"
        )
        assert row["received_bytes"] == row["derived_bytes"], row
    large = [
        {
            "method": method,
            "tokens": tokens,
            "derived_bytes": derived(
                method, tokens, LARGE["ranks"], LARGE["heads"], LARGE["head_dim"], LARGE["width"], 2
            ),
        }
        for method in (*STATE_METHODS, *TOKEN_METHODS)
        for tokens in LARGE_LENGTHS
    ]
    record = {
        "what": "bytes received by a rank for one layer, forward and backward, the most of any rank",
        "date": datetime.date.today().isoformat(),
        "machine": f"gloo, {platform.machine()}",
        "torch": torch.__version__,
        "shape": {"ranks": size, "heads": HEADS, "head_dim": HEAD_DIM, "width": WIDTH, "dtype": "fp32"},
        "large_shape": LARGE,
        "counted": rows,
        "large": large,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date']}-cpu-volume.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, image)
    print(f"written to {path} and {image}")


if __name__ == "__main__":
    main()
