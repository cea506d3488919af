"""The structure the design promises, read from the source: who imports whom, and who calls collectives."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "lasp"

# A package may import those of lower levels, and itself.
LEVELS = {
    "files": 0,
    "algebra": 0,
    "distributed": 0,
    "recurrence": 1,
    "kernels": 2,
    "exchange": 3,
    "sequence": 4,
    "ops": 5,
    "halo": 5,
    "softmax": 5,
    "layers": 6,
    "models": 7,
    "parallelize": 8,
    "generate": 8,
    "data": 8,
    "analysis": 8,
    "train": 9,
    "cli": 10,
    "__main__": 11,
}
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "gather", "irecv", "isend", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
}  # fmt: skip


def package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST) -> set[str]:
    """Modules imported anywhere but for type checking."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # "from lasp import x" may import a package x.
            found |= {f"lasp.{alias.name}" for alias in node.names} if node.module == "lasp" else {node.module}
        found |= imports(node)
    return found


def violations(path: Path, tree: ast.AST) -> list[str]:
    own = package(path)
    found = []
    for module in imports(tree):
        other = module.split(".")[1] if module.startswith("lasp.") else ""
        if other in LEVELS and other != own and LEVELS[other] >= LEVELS[own]:
            found.append(f"{path.relative_to(SOURCE)} imports {module}")
        if module.split(".")[0] == "triton" and not path.relative_to(SOURCE).as_posix().startswith(
            ("kernels/triton", "exchange/peer")
        ):
            found.append(f"{path.relative_to(SOURCE)} imports triton")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in COLLECTIVES
            and ast.unparse(node.value) in ("dist", "torch.distributed")
            and path.relative_to(SOURCE).as_posix() != "distributed/comm.py"
        ):
            found.append(f"{path.relative_to(SOURCE)} calls dist.{node.attr}")
    return found


def test_imports_point_downwards():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "__init__.py" or path.parent != SOURCE:
            assert package(path) in LEVELS, f"{path}: give the new package a level"
            found += violations(path, ast.parse(path.read_text()))
    assert not found, found


def test_a_violation_is_seen():
    """The control: what the rules forbid is found."""
    wrong = "import triton\nfrom lasp.cli import main\ndef f():\n    dist.all_reduce(x)\n"
    assert len(violations(SOURCE / "algebra" / "wrong.py", ast.parse(wrong))) == 3
