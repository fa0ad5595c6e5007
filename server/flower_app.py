"""A small Flower app that names the installed packages, so that `flwr run` runs it on any federation."""

import json
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from fedhead import __version__
from fedhead.config import GENERATION, RunConfig, Scalar, merge, parse_assignments
from fedhead.errors import UserError
from fedhead.files import disk_errors, require_new_folder, write_atomically

_HEAD = """\
# A Flower app that runs fedhead: flwr run . CONNECTION --stream
# fedhead has to be installed on the SuperLink's machine and at every SuperNode. A SuperNode says what is its own:
#   flower-supernode --node-config 'site="hospital-a" data="folder:/data/xrays" device="auto"'
# Settings below can be changed for one run: flwr run . --run-config 'rounds=5 local.lr=0.05'

"""


_OWN_CLASSES = ("clusters", GENERATION)
"""Tasks whose outputs are known without naming any."""

LISTS = ("classes", "subgroups")
"""Settings that are lists, which Flower's run config cannot hold; their text is JSON, and thus TOML."""


def write_flower_app(folder: Path, config: RunConfig, out: str = "") -> Path:
    """Write the app that runs `config`, and return its `pyproject.toml`.

    Args:
        folder: a new or empty one.
        config: of a run over real sites, so it names its classes.
        out: the run folder, on the SuperLink's machine; a new one under `runs/` where its process runs if empty.

    Raises:
        UserError: if the folder is not empty, or the configuration names no classes.
    """
    if config.task not in _OWN_CLASSES and not config.classes and not config.classes_from:
        raise UserError("A run over real sites needs its classes: --classes a,b,c, or classes = [...] in the file.")
    with disk_errors(folder):
        require_new_folder(folder, "a Flower app needs one of its own.")
    major_minor = ".".join(__version__.split(".")[:2])
    app = {
        "project": {
            "name": "fedhead-run",
            "version": "1.0.0",
            "description": "Federated transfer learning with fedhead.",
            "license": "Apache-2.0",
            "dependencies": [f"fedhead=={major_minor}.*"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedhead",
                    "components": {"serverapp": "fedhead.server.app:app", "clientapp": "fedhead.client.app:app"},
                    # Written out, a default would count as chosen, and its task could no longer decide it.
                    "config": {"out": out, **to_run_config(config.settled())},
                }
            }
        },
    }
    path = folder / "pyproject.toml"
    write_atomically(path, _HEAD + tomli_w.dumps(app))
    path.chmod(0o644)
    return path


def to_run_config(config: RunConfig) -> dict[str, Scalar | dict[str, Scalar]]:
    """Return the settings of a run as Flower's run config has them: scalars, and tables of scalars."""
    values = config.model_dump(mode="json", exclude={"simulation"})
    lists = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items() if isinstance(value, list)}
    return values | lists


def from_run_config(values: Mapping[str, Scalar]) -> RunConfig:
    """Read a Flower run config, whose tables Flower has flattened to keys with dots.

    Raises:
        UserError: if it does not describe a run.
    """
    nested: dict[str, object] = {}
    for path, value in values.items():
        if path == "out":
            continue
        *tables, key = path.split(".")
        change: dict[str, object] = {key: value}
        if path in LISTS:
            change = parse_assignments([f"{path}={value}"])
        for table in reversed(tables):
            change = {table: change}
        nested = merge(nested, change)
    return RunConfig.from_values(nested)
