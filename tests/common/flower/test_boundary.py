"""Only `fedhead.flower` may rely on what Flower does not document."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCUMENTED = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation"}
ROOT = Path(__file__).parents[3]
FOLDERS = ("client", "common", "server", "simulations")


def undocumented(source: str) -> Iterator[str]:
    """Yield every import of an undocumented Flower module, and every write to a Flower object's private fields."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "flwr" and not known(each.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr" and node.level == 0:
            yield from ([node.module or ""] if not known(node.module or "") else [])
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            private = isinstance(node.slice, ast.Constant) and str(node.slice.value).startswith("_")
            if node.value.attr == "__dict__" and private:
                yield ast.unparse(node)


def known(module: str) -> bool:
    return module in DOCUMENTED


def modules() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if not path.is_relative_to(ROOT / "common" / "flower")]


def test_only_one_package_relies_on_undocumented_flower() -> None:
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in modules()}
    assert len(sources) > 80
    assert {path: found for path, source in sources.items() if (found := list(undocumented(source)))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import flwr.supercore.run",
        "from flwr.proto.node_pb2 import NodeInfo",
        "def f():\n    from flwr.serverapp.strategy.strategy_utils import sample_nodes",
        "message.metadata.__dict__['_message_id'] = 'x'",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert list(undocumented(source))


def test_documented_modules_pass() -> None:
    assert list(undocumented("from flwr.app import Message\nimport flwr.serverapp.strategy")) == []
