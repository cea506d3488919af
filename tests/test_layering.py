"""The structure the design promises, read from the source: who imports whom, and who calls collectives."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lasp"

# A package may import those of lower levels, and itself.
ORDER = """
errors, files, terminal < algebra, distributed < recurrence < kernels < exchange < sequence < ops, halo, softmax
    < layers < models < parallelize, generate, hf, data, analysis < train < check, bench < cli < __main__
"""
LEVELS = {name.strip(): level for level, names in enumerate(ORDER.split("<")) for name in names.split(",")}
# The only importers of these. transformers is loaded by name (hf/library.py): it takes seconds, and may not be there.
IMPORTERS = {"triton": ("kernels/triton/", "exchange/peer/"), "transformers": ()}
MAX_ARGUMENTS = 20
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
        own_place = path.relative_to(SOURCE).as_posix()
        head = module.split(".")[0]
        if not own_place.startswith(IMPORTERS.get(head, own_place)):
            found.append(f"{path.relative_to(SOURCE)} imports {head}")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in COLLECTIVES
            and ast.unparse(node.value) in ("dist", "torch.distributed")
            and path.relative_to(SOURCE).as_posix() != "distributed/comm.py"
        ):
            found.append(f"{path.relative_to(SOURCE)} calls dist.{node.attr}")
    return found


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def test_imports_point_downwards():
    found = []
    for path, tree in sources().items():
        if path.name != "__init__.py" or path.parent != SOURCE:
            assert package(path) in LEVELS, f"{path}: give the new package a level"
            found += violations(path, tree)
    assert not found, found


def test_a_violation_is_seen():
    """The control: what the rules forbid is found."""
    wrong = "import triton\nfrom lasp.cli import main\ndef f():\n    dist.all_reduce(x)\nimport transformers.utils\n"
    assert len(violations(SOURCE / "algebra" / "wrong.py", ast.parse(wrong))) == 4


def test_contributing_says_the_same_order():
    page = " ".join((SOURCE.parents[1] / "CONTRIBUTING.md").read_text().split())
    assert " ".join(ORDER.split()) in page


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_files(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of the package that are imported at the head of a file, for type checking too: not inside functions."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # "from package import module" imports the module; a name comes from the package itself.
            found |= names & known or {node.module}
        found |= imported_files(node, known)
    return found & known


def circles(graph: dict[str, set[str]]) -> list[str]:
    """A circle of files for each file that a walk along imports comes back to."""
    done: set[str] = set()
    found = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def file_graph(trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    known = {module_name(path) for path in trees}
    return {module_name(path): imported_files(tree, known) - {module_name(path)} for path, tree in trees.items()}


def test_no_files_import_in_a_circle():
    assert not circles(file_graph(sources()))


def test_a_circle_is_seen():
    trees = {
        SOURCE / "algebra" / "a.py": ast.parse("if TYPE_CHECKING:\n    from lasp.algebra.b import x"),
        SOURCE / "algebra" / "b.py": ast.parse("from lasp.algebra import a"),
    }
    assert circles(file_graph(trees)) == ["lasp.algebra.a -> lasp.algebra.b -> lasp.algebra.a"]


def repeated_classes(trees: dict[Path, ast.Module]) -> list[str]:
    """Class names that stand more than once; a nested `Config` excepted."""
    names = [
        node.name for tree in trees.values() for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name != "Config"
    ]  # fmt: skip
    return sorted({name for name in names if names.count(name) > 1})


def test_class_names_are_unique():
    assert not repeated_classes(sources())


def test_a_repeated_class_is_seen():
    trees = {SOURCE / name: ast.parse("class Plan: ...\nclass Config: ...") for name in ("a.py", "b.py")}
    assert repeated_classes(trees) == ["Plan"]


def too_wide(path: Path, tree: ast.AST) -> list[str]:
    """Calls with too many positional arguments, definitions with too many parameters but kernels', and kernels that are
    launched with any by position."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            launched = isinstance(node.func, ast.Subscript) and ast.unparse(node.func.value).endswith("kernel")
            if len(node.args) > (0 if launched else MAX_ARGUMENTS):
                found.append(f"{path}:{node.lineno}: a call with {len(node.args)} positional arguments")
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if count > MAX_ARGUMENTS:
                found.append(f"{path}:{node.lineno}: {node.name} has {count} parameters")
    return found


def is_kernel(node: ast.FunctionDef) -> bool:
    """True if a function is one that is launched, not one that kernels call."""
    return node.name.endswith("_kernel") and any(
        re.search(r"(triton|gluon)\.jit", ast.unparse(mark)) for mark in node.decorator_list
    )


def test_calls_and_definitions_are_narrow():
    found = [wide for path, tree in sources().items() for wide in too_wide(path, tree)]
    assert not found, found


def test_a_wide_call_is_seen():
    parameters = ", ".join(f"x{n}" for n in range(21))
    wide = f"f({parameters})\ndef g({parameters}): ...\n@triton.jit\ndef h({parameters}): ...\nself.kernel[grid](x)"
    assert len(too_wide(SOURCE / "a.py", ast.parse(wide))) == 4
    narrow = f"@triton.jit\ndef h_kernel({parameters}): ...\nself.kernel[grid](x=x, y=y)"
    assert not too_wide(SOURCE / "a.py", ast.parse(narrow))


def wrongly_untyped(text: str) -> bool:
    """True if mypy leaves a file out that holds no kernel, or looks into one that does."""
    languages = ("import triton.language as tl", "from triton.experimental.gluon import language as gl")
    return ("# mypy: ignore-errors" in text) != any(language in text for language in languages)


def test_only_kernels_are_untyped():
    """Triton's language has no Python types; the code around it has, and a launch is where they matter."""
    assert not [path for path in sources() if wrongly_untyped(path.read_text())]
    assert wrongly_untyped("# mypy: ignore-errors\nimport triton")


# Words that neither say what is done nor what is returned.
VAGUE = re.compile(
    "(After|Also|And|Are|As|At|Before|By|For|From|How|If|In|Is|Its|Likewise|Not|Nothing|Of|On|Or|Over|So|That|Those|To"
    r"|What|When|Where|Whether|Which|Who|Why|With)\b"
)


def vague_docstrings(path: Path, tree: ast.AST) -> list[str]:
    """Docstrings that start neither with a verb nor with what is returned."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if VAGUE.match(text):
                found.append(f"{path}: {text.splitlines()[0]}")
    return found


def test_docstrings_start_with_a_verb_or_what_is_returned():
    others = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    trees = sources() | {path: ast.parse(path.read_text()) for path in others}
    assert not [vague for path, tree in trees.items() for vague in vague_docstrings(path, tree)]


def test_a_vague_docstring_is_seen():
    vague = """'What it does.'\nclass A:\n  'Likewise.'\n  def f():\n    'Whether.'\n  def g():\n    'Width.'"""
    assert len(vague_docstrings(SOURCE / "a.py", ast.parse(vague))) == 3


def doors(trees: dict[Path, ast.Module]) -> list[str]:
    """Files in which an exchange is started, and in which a schedule is begun."""
    found = []
    for path, tree in trees.items():
        place = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_start = name == "start" and "lasp.exchange.start" in ast.unparse(tree)
                is_begin = name.endswith(".begin") and "summary" in ast.unparse(node)
                if (is_start and not place.startswith("exchange/")) or (is_begin and "exchange" not in place):
                    found.append(place)
    return sorted(found)


def test_an_exchange_has_one_door():
    """Forward and backward start an exchange in ops/scan.py, once each; schedules are begun within exchange only."""
    ends = ("ops/scan.py", "ops/scan.py")
    # `lasp check` begins one itself: its control carries nothing.
    assert [place for place in doors(sources()) if place != "check/compare.py"] == list(ends)
    opened = {SOURCE / "halo" / "x.py": ast.parse("schedule.begin(comm, summary, initial)")}
    assert doors(opened) == ["halo/x.py"]


def test_benchmarks_have_the_folder_of_their_results() -> None:
    """One that is not there costs a script its figures after minutes of work."""
    sources = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    writing = {name for name, source in sources.items() if re.search(r"\.output / ", source)}
    assert len(writing) > 10
    assert not {name for name in writing if not re.search(r"type=folder|\.output\.mkdir\(", sources[name])}
