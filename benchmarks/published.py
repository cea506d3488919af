"""Published tables beside the predictions of lasp.analysis, with errors: the tables of docs/results/predictions.md.

    python -m benchmarks.published            (seconds; writes docs/results/published.md and a JSON file)

Published values are inputs, from LASP (arXiv 2404.02882; read off its figures to about 1 %, memory by eye), LASP-2
(2502.07563, table 6) and ZeCO (2507.01004, by way of a secondary source). Two predictions stand beside a throughput:
`model` is lasp.analysis as it is, for this library. `as they ran` takes in what is known of the authors' runs: a fixed
time per step, fitted to each published table by itself (the median of what is missing), because their steps take a
second or more whatever their length; and LASP's released code receives the state before it starts its own attention,
so that the ranks' attention kernels run one after another (derived: sp times our kernels' time, no fit).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lasp.analysis.devices import A100, H100, Device
from lasp.analysis.planner import Estimate, Job, ParallelLayout, estimate, longest
from lasp.models import ModelConfig, preset

ROOT = Path(__file__).parent.parent
K, M = 1 << 10, 1 << 20

# LASP, tokens/s on 64 A100 (SP = 64, batch 1); None: out of memory at this length.
COMPARISON = {
    "1b": {
        "lasp": {128 * K: 97.8e3, 256 * K: 171e3, 512 * K: 285e3, M: 438e3, 2 * M: 585e3, 4 * M: None},
        "ulysses": {128 * K: 70e3, 256 * K: 125e3, 512 * K: 197e3, M: None},
        "megatron": {64 * K: 19.8e3, 128 * K: 38.7e3, 256 * K: 72.5e3, 512 * K: None},
    },
    "7b": {
        "lasp": {64 * K: 7.5e3, 128 * K: 12.0e3, 256 * K: 24.1e3, 512 * K: 37.2e3, M: None},
        "ulysses": {64 * K: 6.0e3, 128 * K: 8.8e3, 256 * K: None},
        "megatron": {32 * K: 2.2e3, 64 * K: 4.06e3, 128 * K: None},
    },
}
LENGTHS = [2 * K, 16 * K, 64 * K, 128 * K, 256 * K, 512 * K, M, 2 * M, 4 * M]
# LASP, TNL-1B, batch 1, tokens/s by GPUs.
FSDP: dict[int, list[float | None]] = {
    16: [1905, 13810, 48571, 85238, 137143, 201905, None],
    32: [1905, 13333, 50000, 92857, 159524, 250952, 358571, None],
    64: [1905, 12857, 50000, 97143, 171429, 284762, 438095, 585238, None],
    128: [1905, 12381, 50000, 99048, 179048, 299048, 460000, 598095, 792857],
}
DDP: dict[int, list[float | None]] = {
    16: [1780, 14045, 52819, 107814, 201978, None],
    32: [1780, 14837, 53215, 93571, 190504, 323442, None],
    64: [1780, 13650, 52028, 99901, 193274, 304451, 523244, None],
    128: [1780, 13650, 52028, 95945, 187339, 294955, 508605, 658556],
}
# LASP, GB per GPU by tokens per GPU; of FSDP those of 64 GPUs.
FSDP_MEMORY: dict[int, float] = {4 * K: 10.5, 8 * K: 18.7, 16 * K: 34.7, 32 * K: 67.0}
DDP_MEMORY: dict[int, float] = {2 * K: 24.5, 4 * K: 28.4, 8 * K: 36.2, 16 * K: 51.7}
# LASP-2, table 6: tokens/s and GB per GPU, Linear-Llama3-1B, by length and GPUs.
LASP2: dict[int, list[tuple[float, float] | None]] = {
    2 * K: [(1254, 25.6), (1209, 25.6), (1285, 25.6), (1205, 25.6)],
    16 * K: [(9530, 25.6), (9494, 25.6), (9305, 25.6), (9313, 25.6)],
    64 * K: [(35507, 33.8), (34240, 28.7), (34118, 25.6), (33344, 25.6)],
    256 * K: [(135635, 57.8), (132605, 40.2), (130215, 33.8), (131550, 28.7)],
    512 * K: [None, (250586, 57.8), (245353, 40.2), (233442, 33.8)],
    M: [None, None, (442221, 57.8), (416465, 40.2)],
    2 * M: [None, None, None, (769030, 57.8)],
}
LASP2_GPUS = (16, 32, 64, 128)
# ZeCO: ms of one exchange, 32 heads of 128, H100s, by GPUs: all-scan, all-gather.
ALL_SCAN = {
    8: (0.226, 0.375),
    16: (0.297, 0.658),
    32: (0.448, 1.616),
    64: (0.739, 2.543),
    128: (1.272, 4.350),
    256: (2.165, 8.514),
}
# ZeCO: tokens/s/GPU, 1B GLA, 32K tokens a GPU: LASP-1, LASP-2, ZeCO, data parallel.
GLA = {
    8: (27014, 42946, 47369, 49633),
    64: (12268, 37485, 44468, 48230),
    128: (None, 33327, 43278, 47848),
    256: (None, 25402, 40967, 46588),
}


# What a published value rests on.
FIGURE = "digitised from the paper's figure, to about 1 %"
BY_EYE = "read off the paper's figure by eye, to about 0.5 GB"
PRINTED = "as printed in the paper's table"
SECONDARY = "ZeCO's tables by way of a secondary source, not seen in the paper"


class Line(NamedTuple):
    """One published value, tokens/s, beside ours; `serial` where the authors' ranks attend one after another."""

    what: str
    published: float | None
    predicted: Estimate
    serial: bool = False

    @property
    def as_released_s(self) -> float:
        """Seconds of a step, without the fixed overhead."""
        waiting = self.predicted.attention_s * (self.predicted.layout.sp - 1) if self.serial else 0.0
        return self.predicted.step_s + waiting


def laid_out(
    config: ModelConfig, device: Device, gpus: int, tokens: int, method: str, sharding: str, schedule: str
) -> Estimate:
    """The published layout: one sequence over all GPUs, nothing computed again."""
    job = Job(config=config, device=device, devices=gpus, seq_len=tokens, batch=1)
    return estimate(job, ParallelLayout(method, 1, gpus, sharding, "none", schedule))


def throughput_table(title: str, source: str, lines: Sequence[Line]) -> tuple[list[str], dict[str, Any]]:
    """Markdown of a table, and its values; the overhead is fitted to this table's lines alone."""
    missing = [line.predicted.tokens / line.published - line.as_released_s for line in lines if line.published]
    overhead = max(0.0, statistics.median(missing))
    rows: list[str] = []
    values: list[dict[str, Any]] = []
    for line in lines:
        ours = line.predicted.tokens_per_s
        theirs = line.predicted.tokens / (line.as_released_s + overhead)
        errors = [value / line.published - 1 if line.published else None for value in (ours, theirs)]
        note = "" if line.predicted.fits else " (does not fit)"
        rows.append(
            f"| {line.what} | {_number(line.published)} | {_number(ours)}{note} | {_error(errors[0])} | "
            f"{_number(theirs)} | {_error(errors[1])} |"
        )
        values.append(
            {
                "what": line.what,
                "published": line.published,
                "model": ours,
                "fits": line.predicted.fits,
                "as_they_ran": theirs,
                "errors": errors,
            }
        )
    known = [[abs(row["errors"][index]) for row in values if row["errors"][index] is not None] for index in (0, 1)]
    medians = [statistics.median(each) for each in known]
    text = [
        f"## {title}",
        "",
        f"Published: {source}. Model: derived. As they ran: overhead fitted to this table, {overhead:.2f} s a step. "
        f"Median error: {medians[0]:.0%} of the model, {medians[1]:.0%} as they ran.",
        "",
        "| | published tokens/s | model | error | as they ran | error |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return text, {"overhead_s": overhead, "median_error": medians, "rows": values}


def memory_table(
    title: str, source: str, lines: Sequence[tuple[str, float, float]]
) -> tuple[list[str], dict[str, Any]]:
    rows = [
        f"| {what} | {published:.1f} | {ours / 1e9:.1f} | {_error(ours / 1e9 / published - 1)} |"
        for what, published, ours in lines
    ]
    errors = [abs(ours / 1e9 / published - 1) for _, published, ours in lines]
    text = [
        f"## {title}",
        "",
        f"Published: {source}. Model: derived. Median error {statistics.median(errors):.0%}.",
        "",
        "| | published GB | model | error |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    return text, {"median_error": statistics.median(errors), "rows": [list(line) for line in lines]}


def comparison(size: str) -> tuple[list[str], dict[str, Any]]:
    """Section 2.2: three methods on 64 GPUs. The heads are made 64 where a method must divide them."""
    config = preset("transnormer", size)
    width = config.num_heads * config.key_dim
    divisible = preset("transnormer", size, num_heads=64, key_dim=width // 64, value_dim=width // 64)
    if divisible.ffn_dim % 64:
        divisible = preset(
            "transnormer",
            size,
            num_heads=64,
            key_dim=width // 64,
            value_dim=width // 64,
            ffn_dim=-(-config.ffn_dim // 64) * 64,
        )
    lines = []
    for method, values in COMPARISON[size].items():
        for tokens, published in values.items():
            model = config if method == "lasp" else divisible
            sharding = "ddp" if method == "megatron" else "zero3"
            found = laid_out(model, A100, 64, tokens, method, sharding, "ring" if method == "lasp" else "-")
            lines.append(Line(f"{method}, {_length(tokens)}", published, found, serial=method == "lasp"))
    title = f"LASP, figure of TNL-{size.upper()} on 64 A100: three methods"
    return throughput_table(title, f"{FIGURE}, of Ulysses to about 5 %", lines)


_PUBLISHED_AS = {"zero3": "FSDP", "ddp": "DDP"}


def scaling(sharding: str, table: dict[int, list[float | None]]) -> tuple[list[str], dict[str, Any]]:
    """Section 2.3: one sequence over 16 to 128 GPUs."""
    config, lines = preset("transnormer", "1b"), []
    for gpus, values in table.items():
        for tokens, published in zip(LENGTHS, values, strict=False):
            found = laid_out(config, A100, gpus, tokens, "lasp", sharding, "ring")
            lines.append(Line(f"{gpus} GPUs, {_length(tokens)}", published, found, serial=True))
    return throughput_table(f"LASP, TNL-1B with {_PUBLISHED_AS[sharding]}", FIGURE, lines)


def lasp2() -> tuple[list[str], dict[str, Any], list[str], dict[str, Any]]:
    """Section 2.6: Linear-Llama3-1B: 16 layers, width 2048, feed-forward 8192, one state for 16 heads of 128."""
    config = preset(
        "linear-transformer",
        "1b",
        vocab_size=128256,
        ffn="swiglu",
        norm="rmsnorm",
        feature_map="identity",
        normalization="hidden",
        positions="none",
        tied_embeddings=True,
    )
    lines, memory = [], []
    for tokens, values in LASP2.items():
        for gpus, published in zip(LASP2_GPUS, values, strict=True):
            found = laid_out(config, A100, gpus, tokens, "lasp", "ddp", "all_gather")
            lines.append(Line(f"{gpus} GPUs, {_length(tokens)}", published[0] if published else None, found))
            if published:
                memory.append((f"{gpus} GPUs, {_length(tokens)}", published[1], found.memory.total))
    return (
        *throughput_table("LASP-2, table 6", PRINTED, lines),
        *memory_table("LASP-2, table 6: GB per GPU", PRINTED, memory),
    )


def exchanges() -> tuple[list[str], dict[str, Any]]:
    """Section 2.7: the exchange alone, by the schedules' own cost model."""
    from lasp.analysis.planner import nodes_of
    from lasp.exchange import EXCHANGES, Payload
    from lasp.exchange.cost import Model

    load, rows, errors = Payload(32, 128, 128, 128), [], []
    for gpus, (scan, gather) in ALL_SCAN.items():
        model = Model(load, nodes_of(H100, gpus), H100.constants)
        ours = {name: 1e3 * make().seconds(model, want_total=False) for name, make in EXCHANGES.items()}
        errors += [ours["pipelined"] / scan - 1, ours["all_gather"] / gather - 1]
        others = min((name for name in ours if name not in ("pipelined", "all_gather")), key=lambda name: ours[name])
        rows.append(
            f"| {gpus} | {scan:.3f} | {ours['pipelined']:.3f} | {_error(errors[-2])} | {gather:.3f} | "
            f"{ours['all_gather']:.3f} | {_error(errors[-1])} | {others} {ours[others]:.3f} |"
        )
    text = [
        "## ZeCO: one exchange, 32 states of 128 x 128, ms on H100s", "",
        f"Published: {SECONDARY}. Model: the schedules' cost model with assumed constants. Median error "
        f"{statistics.median(map(abs, errors)):.0%}. The last column is the fastest of this library's other schedules.",
        "",
        "| GPUs | all-scan | pipelined | error | all-gather | all_gather | error | fastest other |",
        "|---|---|---|---|---|---|---|---|", *rows, "",
    ]  # fmt: skip
    return text, {"median_error": statistics.median(map(abs, errors)), "errors": errors}


def gla() -> tuple[list[str], dict[str, Any]]:
    """Section 2.7: a model of 1B, 32K tokens a GPU, by schedule."""
    config, lines = preset("gla", "1b", num_heads=16, key_dim=128, value_dim=128), []
    for gpus, published in GLA.items():
        for name, schedule, value in zip(
            ("LASP-1", "LASP-2", "ZeCO"), ("ring", "all_gather", "pipelined"), published, strict=False
        ):
            found = laid_out(config, H100, gpus, 32 * K * gpus, "lasp", "zero3", schedule)
            lines.append(Line(f"{name}, {gpus} GPUs", None if value is None else value * gpus, found, name == "LASP-1"))
        single = estimate(
            Job(config=config, device=H100, devices=gpus, seq_len=32 * K, batch=gpus),
            ParallelLayout("data", gpus, 1, "zero3", "none", "-"),
        )
        lines.append(Line(f"data parallel, {gpus} GPUs", published[3] * gpus, single))
    return throughput_table("ZeCO: 1B GLA, 32K tokens a GPU, H100s", SECONDARY, lines)


def longest_sequences() -> list[str]:
    """Published and predicted longest sequences on 64 GPUs, powers of two."""
    rows = []
    for size, methods in COMPARISON.items():
        for method, values in methods.items():
            published = max(tokens for tokens, value in values.items() if value)
            config = preset("transnormer", size)
            if method != "lasp":
                width = config.num_heads * config.key_dim
                config = preset(
                    "transnormer",
                    size,
                    num_heads=64,
                    key_dim=width // 64,
                    value_dim=width // 64,
                    ffn_dim=-(-config.ffn_dim // 64) * 64,
                )
            sharding = "ddp" if method == "megatron" else "zero3"
            fitting = [
                1 << power
                for power in range(11, 30)
                if laid_out(config, A100, 64, 1 << power, method, sharding, "ring" if method == "lasp" else "-").fits
            ]
            most = longest(config, A100, 64, method)
            cells = [_length(tokens) if tokens else "-" for tokens in (published, max(fitting, default=0), most)]
            rows.append(f"| {size}, {method} | {' | '.join(cells)} |")
    return [
        "## Longest sequence on 64 A100",
        "",
        f"Published: the longest that the figures above show, {FIGURE}. Model: derived.",
        "",
        "| | published | model, the published layout | model, with recomputation |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _number(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:,.0f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0%}"


def _length(tokens: int) -> str:
    return f"{tokens // M}M" if tokens >= M else f"{tokens // K}K"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text: list[str] = []
    record: dict[str, Any] = {"what": "published tables and predictions", "date": datetime.date.today().isoformat()}
    for size in COMPARISON:
        part, record[f"comparison {size}"] = comparison(size)
        text += part
    text += longest_sequences()
    for sharding, table in (("zero3", FSDP), ("ddp", DDP)):
        part, record[f"scaling {sharding}"] = scaling(sharding, table)
        text += part
    config = preset("transnormer", "1b")
    for sharding, peaks in (("zero3", FSDP_MEMORY), ("ddp", DDP_MEMORY)):
        lines = [
            (
                f"{_length(n)} tokens a GPU",
                value,
                laid_out(config, A100, 64, 64 * n, "lasp", sharding, "ring").memory.total,
            )
            for n, value in peaks.items()
        ]
        part, record[f"memory {sharding}"] = memory_table(
            f"LASP, TNL-1B with {_PUBLISHED_AS[sharding]} on 64 GPUs: GB per GPU", BY_EYE, lines
        )
        text += part
    speed, record["lasp-2"], memory, record["lasp-2 memory"] = lasp2()
    text += [*speed, *memory]
    for name, make in (("exchanges", exchanges), ("gla", gla)):
        part, record[name] = make()
        text += part
    page = ROOT / "docs" / "results" / "published.md"
    head = [
        "# Published tables beside the predictions",
        "",
        "Written by `python -m benchmarks.published`; see [predictions](predictions.md) for what they mean.",
        "",
    ]
    page.write_text("\n".join([*head, *text]).rstrip() + "\n")
    path = ROOT / "benchmarks" / "results" / f"{record['date']}-published.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for name, part in record.items():
        if isinstance(part, dict):
            print(name, "median error", part["median_error"], "overhead", part.get("overhead_s"))
    print(f"written to {page} and {path}")


if __name__ == "__main__":
    main()
