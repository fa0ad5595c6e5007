"""The engine for comparison: Flower's own simulation on Ray, one task per site and message, with the identical apps.

A site is described by files in a folder that all machines of the cluster see, and lives in whichever worker its next
message goes to. Everything here is importable, because code in `__main__` is pickled anew for every message.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedhead.backbones import load_backbone
from fedhead.client.app import make_app
from fedhead.client.release.guard import Guard
from fedhead.client.release.subgroups import Subgroups
from fedhead.config import RunConfig
from fedhead.data import IntArray
from fedhead.devices import pick_device
from fedhead.errors import FedheadError
from fedhead.features.store import FeatureStore
from fedhead.files import home, safe_name, write_atomically
from fedhead.flower import keep_identity
from fedhead.protocol.messages import Manifest, WeightsChunk
from fedhead.server.runs.history import Outcome
from fedhead.simulations.cluster import connected
from fedhead.simulations.sites import SharedData, SimulatedSite
from fedhead.tasks import make_task

_OWN_LABELS = "own_labels.npy"
_SUBGROUPS = "subgroups.npy"

START_SECONDS = 120.0
"""How long sites may take to register with Flower's engine, which is in memory."""


@dataclass(frozen=True)
class _Told:
    """What a worker needs to know, as JSON; arrays lie beside it."""

    backbone: str
    weights: str
    layer: str
    seed: int
    device: str
    features: str
    min_class_count: int
    min_rows: int
    task: str
    classes: list[str]
    subgroups: list[str]


class FlowerSite(SimulatedSite):
    """A simulated site in whichever process its message reaches; that it has the backbone is noted in a file."""

    def __init__(self, name: str, rows: IntArray, shared: SharedData, folder: Path) -> None:
        super().__init__(name, rows, shared)
        self._mark = folder / f"{safe_name(name)}.installed"

    def has_weights(self, manifest: Manifest) -> bool:
        return super().has_weights(manifest) or self._mark.exists()

    def install(self, manifest: Manifest, chunk: WeightsChunk) -> int | None:
        received = super().install(manifest, chunk)
        if received is None:
            self._mark.touch()
        return received


def run_on_flower(
    config: RunConfig,
    rows: Mapping[str, IntArray],
    shared: SharedData,
    store: FeatureStore,
    coordinate: Callable[[Grid], Outcome],
) -> Outcome:
    """Run a coordinator over sites in Flower's own engine, here or on the Ray cluster that `config` names.

    Args:
        config: of the run.
        rows: `[n]`, of each site by name.
        shared: the data of all sites.
        store: the features of all rows.
        coordinate: runs the coordinator over a Grid.

    Raises:
        FedheadError: if the run fails.
    """
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flower-run-", dir=home()) as folder:
        _write(Path(folder), config, rows, shared, store)
        return _run(partial(_site_of, folder), len(rows), config.simulation.cluster, coordinate)


def _write(
    folder: Path,
    config: RunConfig,
    rows: Mapping[str, IntArray],
    shared: SharedData,
    store: FeatureStore,
) -> None:
    table = config.simulation
    told = _Told(
        backbone=config.backbone,
        weights=config.weights,
        layer=config.layer,
        seed=config.seed,
        device=table.device,
        features=str(store.path),
        min_class_count=table.min_class_count,
        min_rows=table.min_rows,
        task=config.task,
        classes=list(config.classes),
        subgroups=list(shared.subgroups.names if shared.subgroups else ()),
    )
    write_atomically(folder / "told.json", json.dumps(asdict(told)))
    write_atomically(folder / "names.json", json.dumps(list(rows)))
    np.save(folder / "labels.npy", shared.labels)
    if shared.own_labels is not None:
        np.save(folder / _OWN_LABELS, shared.own_labels)
    if shared.subgroups is not None:
        np.save(folder / _SUBGROUPS, shared.subgroups.numbers)
    np.save(folder / "rows.npy", np.concatenate(list(rows.values())))
    np.save(folder / "ends.npy", np.cumsum([len(own) for own in rows.values()]))


@cache
def _shared(folder: str) -> SharedData:
    told = _Told(**json.loads((Path(folder) / "told.json").read_text(encoding="utf-8")))
    backbone = load_backbone(told.backbone, weights=told.weights, layer=told.layer, seed=told.seed)
    store = FeatureStore.read(Path(told.features))
    labels, own = np.load(Path(folder) / "labels.npy"), Path(folder) / _OWN_LABELS
    numbers = Path(folder) / _SUBGROUPS
    return SharedData(
        backbone.to(pick_device(told.device)),
        store,
        labels,
        Guard(told.min_class_count, told.min_rows),
        make_task(told.task, told.classes),
        own_labels=np.load(own) if own.exists() else None,
        subgroups=Subgroups(tuple(told.subgroups), np.load(numbers)) if numbers.exists() else None,
    )


@cache
def _names(folder: str) -> list[str]:
    names: list[str] = json.loads((Path(folder) / "names.json").read_text(encoding="utf-8"))
    return names


@cache
def _site(folder: str, number: int) -> FlowerSite:
    ends = np.load(Path(folder) / "ends.npy", mmap_mode="r")
    start = int(ends[number - 1]) if number else 0
    rows = np.array(np.load(Path(folder) / "rows.npy", mmap_mode="r")[start : int(ends[number])])
    return FlowerSite(_names(folder)[number], rows, _shared(folder), Path(folder))


def _site_of(folder: str, context: Context) -> FlowerSite:
    return _site(folder, int(str(context.node_config["partition-id"])))


def _run(
    site_of: Callable[[Context], FlowerSite], count: int, cluster: str, coordinate: Callable[[Grid], Outcome]
) -> Outcome:
    """Start Flower's engine, have the coordinator run in its `ServerApp`, and stop it."""
    from flwr.simulation import run_simulation

    ended: list[Outcome | BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            _wait_for(grid, count)
            ended.append(coordinate(grid))
        # It is raised where the run was asked for, and not in Flower's thread.
        except BaseException as error:
            ended.append(error)

    with keep_identity(), _quiet("flwr"), _quiet("ray"), connected(cluster) if cluster else nullcontext():
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
        run_simulation(server, make_app(site_of), count, backend_config={"client_resources": resources})
    if not ended:
        raise FedheadError("Flower's simulation engine ended before the run did.")
    (outcome,) = ended
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _wait_for(grid: Grid, count: int) -> None:
    stop = time.monotonic() + START_SECONDS
    while len(list(grid.get_node_ids())) < count:
        if time.monotonic() > stop:
            raise FedheadError(f"Not all of the {count} sites were there after {START_SECONDS:.0f} s.")
        time.sleep(0.1)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drop a library's output while it starts and stops; failures are raised."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
