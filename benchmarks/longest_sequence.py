"""The longest sequence that trains under the same memory limit per process, at SP=1 and SP=4.

    python benchmarks/longest_sequence.py            (about 10 minutes on two cores)

Every attempt starts fresh processes whose data segment (heap and anonymous memory) is limited by the operating
system (RLIMIT_DATA), and makes one whole training step: forward, backward, gradient sum, AdamW. The longest length
is found by doubling and bisection, to within 1 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def worker(tokens: int, limit_mib: int) -> None:
    """One training step on this rank's share of a sequence, under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mib << 20, limit_mib << 20))
    import torch
    import torch.distributed as dist

    from lasp.distributed.mesh import build_mesh
    from lasp.models import CausalLM, preset
    from lasp.parallelize import parallelize

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEET"], rank=rank, world_size=size)
    torch.manual_seed(0)
    model = parallelize(CausalLM(preset("transnormer", "tiny", vocab_size=257)), build_mesh(sp=size))
    optimizer = torch.optim.AdamW(model.module.parameters())
    text = torch.randint(257, (1, tokens // size + 1))
    # Two steps: from the second on, the optimizer's state is there too.
    for _ in range(2):
        out = model.training(text[:, :-1], labels=text[:, 1:], sp=model.sp)
        model.mean_loss(out.loss_sum, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def fits(tokens: int, size: int, limit_mib: int) -> bool:
    """Whether a sequence of `tokens` trains over `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", str(tokens), "--limit-mib", str(limit_mib)]
        environment = os.environ | {
            "WORLD_SIZE": str(size),
            "MEET": f"file://{folder}/meet",
            "OMP_NUM_THREADS": "1",
            # glibc gives freed tensors back at once, at any size: what counts is what is in use, not fragmentation.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
        }
        workers = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        answers = [process.communicate() for process in workers]
    good = all(process.returncode == 0 for process in workers)
    errors = " ".join(error for _, error in answers)
    if not good and "memory" not in errors.lower() and "MemoryError" not in errors:
        raise RuntimeError(f"failed, but not for want of memory:\n{errors[-3000:]}")
    peak = f", resident peak {max(int(out) for out, _ in answers)} MiB" if good else ""
    print(f"  SP={size} {tokens:>8} tokens: {'trains' + peak if good else 'out of memory'}", flush=True)
    return good


def longest(size: int, limit_mib: int, unit: int) -> int:
    """The longest sequence in multiples of `unit` tokens, to within 1 %."""
    low, high = 0, unit
    while fits(high, size, limit_mib):
        low, high = high, 2 * high
    while high - low > max(unit, low // 100):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle, size, limit_mib) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mib", type=int, default=1536, help="memory of one process")
    parser.add_argument("--sp", type=int, default=4)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.limit_mib)
        return
    import torch

    print(f"transnormer-tiny, fp32, batch 1, {arguments.limit_mib} MiB per process")
    # A multiple of the chunk on every rank, so that lengths compare exactly.
    found = {size: longest(size, arguments.limit_mib, 64 * arguments.sp) for size in (1, arguments.sp)}
    ratio = found[arguments.sp] / found[1]
    print(
        f"\nlongest sequence at SP=1: {found[1]} tokens, at SP={arguments.sp}: {found[arguments.sp]}: {ratio:.2f} times"
    )
    record = {
        "what": "longest trainable sequence under a limit of RLIMIT_DATA per process",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": "transnormer-tiny, fp32, batch 1",
        "limit_mib": arguments.limit_mib,
        "longest_tokens": {f"sp={size}": tokens for size, tokens in found.items()},
        "ratio": ratio,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date']}-cpu-longest-sequence.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
