"""The journal of a run in progress, kept in its folder: status, sites, seconds by phase, and configuration."""

import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from fedhead.backbones import Backbone
from fedhead.backbones.catalogue import entry_of
from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.files import write_atomically
from fedhead.server.observer import Observer, Phase, SiteState, Step
from fedhead.server.report.card import write_card
from fedhead.server.report.page import write_report
from fedhead.server.runs.history import Outcome
from fedhead.server.runs.record import JOURNAL, BackboneRecord, JournalRecord, SiteRecord, read_journal

logger = logging.getLogger(__name__)

SOFTWARE = ("fedhead", "flwr", "torch", "torchvision", "numpy", "scikit-learn")

LICENCES = {
    "torchvision": "code BSD-3-Clause; the weights' terms follow the data that they were trained on",
}
"""Licences of backbones by source, for backbones without a declared licence."""

MOST_SITES = 1000
"""Largest number of sites listed individually; `standing` counts all."""

_WRITE_SECONDS = 2.0


_version = cache(version)


class Journal(Observer):
    """Updates `journal.json` in a run folder during the run, and writes the run's report at its end.

    Args:
        path: the run folder.
        backbone: the run's backbone.
        simulated: whether the sites are simulated.
        release_steps: see `JournalRecord`.
    """

    def __init__(
        self, path: Path, backbone: Backbone, *, simulated: bool = False, release_steps: Sequence[str] | None = None
    ) -> None:
        self.path = path
        self.record = JournalRecord(
            status="running",
            started=_now(),
            simulated=simulated,
            backbone=_about(backbone),
            versions={"python": platform.python_version(), **{name: _version(name) for name in SOFTWARE}},
            release_steps=None if release_steps is None else tuple(release_steps),
        )
        self._since = time.perf_counter()
        self._written = 0.0
        # A run that is rejected before its first step leaves its folder unchanged.
        self._begun = False

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        """Continue from the record of an earlier process, if the run is resumed."""
        try:
            earlier = read_journal(self.path)
        except FedheadError as problem:
            logger.warning("The journal starts anew: %s", problem)
            earlier = None
        if earlier is not None:
            self.record.started = earlier.started or self.record.started
            self.record.seconds = dict(earlier.seconds)
        self._since = time.perf_counter()

    def on_step(self, step: Step, server_round: int) -> None:
        self._begun = True
        self._count_seconds()
        changed = step != self.record.step
        self.record.step, self.record.phase = step, ""
        if changed or time.perf_counter() - self._written > _WRITE_SECONDS:
            self._write()

    def on_phase(self, phase: Phase) -> None:
        self.record.phase = phase
        if time.perf_counter() - self._written > _WRITE_SECONDS:
            self._write()

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self.record.standing = dict(Counter(state.standing for state in sites.values()))
        # Of many sites, those that do not take part are of interest.
        listed = (
            sorted(sites.items(), key=lambda pair: pair[1].standing == "ready") if len(sites) > MOST_SITES else sites
        )
        self.record.sites = {
            name: SiteRecord(standing=state.standing, rows=state.rows, reason=state.reason, steps=state.steps)
            for name, state in islice(dict(listed).items(), MOST_SITES)
        }
        # With many sites, changes within the interval wait for the next write.
        if len(sites) <= MOST_SITES or time.perf_counter() - self._written > _WRITE_SECONDS:
            self._write()

    def on_finished(self, outcome: Outcome) -> None:
        self._end("finished")

    def on_failed(self, error: BaseException) -> None:
        if not self._begun:
            return
        # SIGTERM and fedhead stop raise SystemExit.
        interrupted = not isinstance(error, Exception)
        self.record.error = "" if interrupted else str(error)
        self._end("interrupted" if interrupted else "failed")

    def _end(self, status: Literal["finished", "failed", "interrupted"]) -> None:
        self._count_seconds()
        self.record.status, self.record.step, self.record.phase, self.record.ended = status, "", "", _now()
        _write_pages(self.path, self._write)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        if step := self.record.step:
            seconds = self.record.seconds
            seconds[step] = seconds.get(step, 0.0) + now - self._since
        self._since = now

    def _write(self) -> None:
        if self.path.is_dir():
            _write_journal(self.path, self.record)
        self._written = time.perf_counter()


def end_journal(path: Path) -> None:
    """Write the end of a finished run whose process was killed before it could: journal, report and model card."""

    def write() -> None:
        record = read_journal(path) or JournalRecord()
        record.status, record.step, record.phase, record.ended = "finished", "", "", record.ended or _now()
        _write_journal(path, record)

    _write_pages(path, write)


def _write_journal(path: Path, record: JournalRecord) -> None:
    write_atomically(path / JOURNAL, json.dumps(record.model_dump()) + "\n")


def _write_pages(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
        write_report(path)
        write_card(path)
    # The results are already written, or the run's own failure matters more; the report can be written again.
    except FedheadError as problem:
        logger.warning("The report or the model card was not written: %s", problem)


def _about(backbone: Backbone) -> BackboneRecord:
    preprocessing: Any = backbone.preprocessing
    steps: dict[str, Any] = asdict(preprocessing) if is_dataclass(preprocessing) else {}  # type: ignore[arg-type]
    return BackboneRecord(
        kind=backbone.kind,
        digest=backbone.digest,
        weights_digest=backbone.weights_digest,
        num_features=backbone.num_features,
        num_bytes=backbone.num_bytes,
        trained=backbone.trained,
        licence=_licence(backbone.spec),
        preprocessing={
            name: _words(value)
            for name, value in steps.items()
            # A recipe holds whole files, such as a tokenizer.
            if value not in (None, ()) and not callable(value) and not isinstance(value, dict)
        },
    )


def _licence(spec: str) -> str:
    try:
        entry = entry_of(spec)
    except FedheadError:
        entry = None
    return (entry.licence if entry else None) or LICENCES.get(spec.partition(":")[0], "unknown")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _words(value: object) -> str:
    """Return a setting for readers: several names or numbers with commas between them."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
