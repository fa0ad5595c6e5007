"""What a run tells of itself while it goes on, kept in its folder: status, sites, seconds by phase, and what ran."""

import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from fedhead.backbones import Backbone
from fedhead.backbones.catalogue import entry_of
from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.files import write_atomically
from fedhead.server.history import Outcome
from fedhead.server.observer import Observer, SiteState, Step
from fedhead.server.report.card import write_card
from fedhead.server.report.page import write_report
from fedhead.server.report.record import JOURNAL

logger = logging.getLogger(__name__)

SOFTWARE = ("fedhead", "flwr", "torch", "torchvision", "numpy", "scikit-learn")

LICENCES = {
    "torchvision": "code BSD-3-Clause; the weights' terms follow the data that they were trained on",
}
"""What is known of a backbone's licence by its source, where the backbone itself does not say."""

MOST_SITES = 1000
"""So many sites are told of each by itself; `standing` counts all."""

_WRITE_SECONDS = 2.0


class Journal(Observer):
    """Keeps `journal.json` of a run folder up to date while it goes on, and writes its report when it ends.

    Args:
        path: the run folder.
        backbone: what runs.
        simulated: whether the sites are simulated.
    """

    def __init__(self, path: Path, backbone: Backbone, *, simulated: bool = False) -> None:
        self.path = path
        self.values: dict[str, Any] = {
            "status": "running",
            "error": "",
            "started": _now(),
            "ended": "",
            "step": "",
            "simulated": simulated,
            "seconds": {},
            "standing": {},
            "sites": {},
            "backbone": _about(backbone),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in SOFTWARE}},
        }
        self._since = time.perf_counter()
        self._written = 0.0
        # A run that is refused before its first step leaves its folder as it was.
        self._begun = False

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        """Go on from what an earlier process wrote, if the run is resumed."""
        earlier = _read(self.path / JOURNAL)
        self.values["started"] = earlier.get("started", self.values["started"])
        self.values["seconds"] = dict(earlier.get("seconds", {}))
        self._since = time.perf_counter()

    def on_step(self, step: Step, server_round: int) -> None:
        self._begun = True
        self._count_seconds()
        changed = step != self.values["step"]
        self.values["step"] = step
        if changed or time.perf_counter() - self._written > _WRITE_SECONDS:
            self._write()

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self.values["standing"] = dict(Counter(state.standing for state in sites.values()))
        # Those that do not take part are what one looks for among many.
        told = sorted(sites.items(), key=lambda pair: pair[1].standing == "ready") if len(sites) > MOST_SITES else sites
        self.values["sites"] = {
            name: {"standing": state.standing, "rows": state.rows, "reason": state.reason}
            for name, state in islice(dict(told).items(), MOST_SITES)
        }
        self._write()

    def on_finished(self, outcome: Outcome) -> None:
        self._end("finished")

    def on_failed(self, error: BaseException) -> None:
        if not self._begun:
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        self.values["error"] = "" if interrupted else str(error)
        self._end("interrupted" if interrupted else "failed")

    def _end(self, status: str) -> None:
        self._count_seconds()
        self.values |= {"status": status, "step": "", "ended": _now()}
        try:
            self._write()
            write_report(self.path)
            write_card(self.path)
        # What the run was for is there already, or its own failure matters more; the report can be written again.
        except FedheadError as problem:
            logger.warning("The report or the model card was not written: %s", problem)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        if step := self.values["step"]:
            seconds = self.values["seconds"]
            seconds[step] = seconds.get(step, 0.0) + now - self._since
        self._since = now

    def _write(self) -> None:
        if self.path.is_dir():
            write_atomically(self.path / JOURNAL, json.dumps(self.values) + "\n")
        self._written = time.perf_counter()


def _about(backbone: Backbone) -> dict[str, Any]:
    preprocessing: Any = backbone.preprocessing
    steps: dict[str, Any] = asdict(preprocessing) if is_dataclass(preprocessing) else {}  # type: ignore[arg-type]
    return {
        "kind": backbone.kind,
        "digest": backbone.digest,
        "weights_digest": backbone.weights_digest,
        "num_features": backbone.num_features,
        "num_bytes": backbone.num_bytes,
        "trained": backbone.trained,
        "licence": _licence(backbone.spec),
        "preprocessing": {name: str(value) for name, value in steps.items() if value is not None},
    }


def _licence(spec: str) -> str:
    try:
        entry = entry_of(spec)
    except FedheadError:
        entry = None
    return (entry.licence if entry else None) or LICENCES.get(spec.partition(":")[0], "not known")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
