"""The modules of the package import one another without cycles."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = {"common": "fedhead"} | {name: f"fedhead.{name}" for name in ("client", "server", "simulations")}


def modules() -> Mapping[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(body: list[ast.stmt], known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that are imported while this code is, which functions and type checks do not count to."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from imported([*node.body, *node.orelse], known)
        elif isinstance(node, ast.Try | ast.ClassDef):
            yield from imported(node.body, known)


def test_no_modules_import_each_other() -> None:
    known = modules()
    assert len(known) > 300
    graph = {
        name: {one for one in imported(ast.parse(path.read_text(encoding="utf-8")).body, known) if one in known}
        for name, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
