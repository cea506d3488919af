"""Lists which compiled kernels of two revisions differ, one of each sort, for a device that need not be there.

    python benchmarks/compiled_kernels.py REV_A REV_B --target cuda:90 --output FILE

Revisions of this repository, unpacked by git, or folders of checkouts. Each compiles what its own
tests/kernels/triton/compile_ahead.py names, in a process of its own. Compared are PTX or GCN without names, comments
and positions in the source. Printed are for each kernel whether its code is equal, differs only in the order of its
instructions (or in registers' names), or in how many instructions of a sort it has; and shared memory, registers and
spilled bytes of both. Times of those that differ are `benchmarks/compare.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from compare import checkouts

# Names of kernels at earlier revisions.
RENAMED = {"mild_": "bounded_", "within": "intra_chunk", "reads": "inter_chunk"}


def compiled(folder: Path, target: str) -> dict[str, dict[str, Any]]:
    """Code and needs of each kernel, by name and occurrence; in the process of a revision."""
    sys.path[:0] = [str(folder / "src"), str(folder / "tests" / "kernels" / "triton")]
    import compile_ahead
    import triton

    found: dict[str, dict[str, Any]] = {}
    occurrences: Counter[str] = Counter()
    for kernel in compile_ahead.one_of_each(target):
        name = kernel.kernel.__name__
        for earlier, later in RENAMED.items():
            name = name.replace(earlier, later)
        occurrences[name] += 1
        made = triton.compile(kernel.source(), target=compile_ahead.target_of(target), options=kernel.options)
        report = compile_ahead.needs(kernel, compile_ahead.target_of(target))
        needs = {what: report.get(what) for what in ("num_warps", "shared", "registers", "spilled_bytes")}
        code = made.asm.get("ptx") or made.asm["amdgcn"]
        found[f"{name} {occurrences[name]}"] = {"code": bare(code, kernel.kernel.__name__), "needs": needs}
    return found


def bare(code: str, name: str) -> list[str]:
    """Lines of code without names, comments and positions in the source."""
    code = code.split(".section\t.debug")[0].replace(name, "kernel")
    lines = (re.sub(r"(//|;;).*", "", line).strip() for line in code.splitlines())
    return [
        re.sub(r"\s+", " ", line) for line in lines if line and not re.match(r"\.(loc|file|version)|\$L__tmp", line)
    ]


def instructions(code: list[str]) -> Counter[str]:
    """Counts instructions by sort, operands and predicates left out."""
    words = (re.sub(r"^@!?%?\w+ ", "", line).split()[0].rstrip(";") for line in code)
    return Counter(word for word in words if not word.startswith((".", "$", "{", "}", ")")) and not word.endswith(":"))


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    if a["code"] == b["code"]:
        return "equal"
    counts_a, counts_b = instructions(a["code"]), instructions(b["code"])
    if counts_a == counts_b:
        return f"the same {counts_a.total()} instructions in another order"
    more, less = counts_b - counts_a, counts_a - counts_b
    return f"{counts_a.total()} instructions, +{more.total()} -{less.total()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REV")
    parser.add_argument("--target", default="cuda:90")
    parser.add_argument("--output", type=Path, help="a text file of what is printed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, output = map(Path, options.revisions)
        output.write_text(json.dumps(compiled(folder, options.target)))
        return 0
    with checkouts(options.revisions) as folders, tempfile.TemporaryDirectory() as temporary:
        results = []
        for number, folder in enumerate(folders):
            output = Path(temporary) / f"{number}.json"
            command = [sys.executable, __file__, "--worker", str(folder.resolve()), str(output)]
            variables = {
                name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")
            }
            variables["TRITON_CACHE_DIR"] = str(Path(temporary) / f"cache-{number}")
            subprocess.run([*command, "--target", options.target], env=variables, check=True)
            results.append(json.loads(output.read_text()))
    a, b = results
    lines = [f"{options.revisions[0]} (A) and {options.revisions[1]} (B) for {options.target}"]
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            lines.append(f"{name:38}only in {'A' if name in a else 'B'}")
            continue
        needs = [
            f"{what} {first}" if first == second else f"{what} {first} -> {second}"
            for (what, first), second in zip(a[name]["needs"].items(), b[name]["needs"].values(), strict=True)
        ]
        lines.append(f"{name:38}{difference(a[name], b[name]):48}{', '.join(needs)}")
    equal = sum(name in b and a[name]["code"] == b[name]["code"] for name in a)
    lines.append(f"{equal} of {len(a.keys() | b.keys())} equal")
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
