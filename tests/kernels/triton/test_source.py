"""Rules of Triton's language that neither the interpreter nor a clean compile shows, read from the kernels' source."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import lasp

LASP = Path(lasp.__file__).parent
KERNELS = (LASP / "kernels" / "triton", LASP / "exchange" / "peer")
# As the short convolution's gradient once was: d2 and d3 stayed zero on GPUs.
WRONG = """
def wrong_kernel():
    d1 = tl.zeros((8,))
    d2 = d1
    d3 = d2
    for n in range(4):
        total = d1 + d2 + d3
        d3 = d2
        d2 = d1
        d1 = total + n
"""


def assignments(node: ast.AST, before: float = math.inf) -> list[tuple[str, ast.expr]]:
    """Names and what they become, target by target, in the order of the source."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for each in ast.walk(node):
        if isinstance(each, ast.AugAssign):
            pairs.append((each.target, ast.Constant(None)))
        elif isinstance(each, ast.Assign):
            for target in each.targets:
                if isinstance(target, ast.Tuple) and isinstance(each.value, ast.Tuple):
                    pairs += zip(target.elts, each.value.elts, strict=True)
                else:
                    pairs.append((target, each.value))
    pairs = [(target, value) for target, value in pairs if target.lineno < before]
    return [(target.id, value) for target, value in sorted(pairs, key=lambda pair: pair[0].lineno)
            if isinstance(target, ast.Name)]  # fmt: skip


def begun_alike(source: str) -> list[str]:
    """Assignments `a = b` in a loop, where both change in it and were one value before it.

    Triton compares values before and after the body to know what a loop carries: such an `a` looks unchanged, and reads
    its first value in every round.
    """
    found = []
    for kernel in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        for loop in (node for node in ast.walk(kernel) if isinstance(node, ast.For | ast.While)):
            first: dict[str, str] = {}  # the variable that each was another name of
            for name, value in assignments(kernel, before=loop.lineno):
                first[name] = first.get(value.id, value.id) if isinstance(value, ast.Name) else name
            inside = assignments(loop)
            changed = {name for name, _ in inside}
            found += [
                f"{kernel.name}: {name} = {value.id}"
                for name, value in inside
                if isinstance(value, ast.Name) and value.id in changed - {name} and name in first
                if first[name] == first.get(value.id)
            ]
    return found


def test_what_follows_another_in_a_loop_begins_as_a_value_of_its_own() -> None:
    assert [
        found for folder in KERNELS for path in folder.rglob("*.py") for found in begun_alike(path.read_text())
    ] == []
    assert begun_alike(WRONG) == [f"wrong_kernel: {pair}" for pair in ("d3 = d2", "d2 = d1")]
    assert begun_alike(WRONG.replace("d2 = d1\n    d3 = d2", "d2 = tl.zeros((8,))\n    d3 = tl.zeros((8,))")) == []
