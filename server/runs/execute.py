"""The one way to run: a run folder from its start, or from an interruption, to its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.files import locked_folder
from fedhead.server.observer import Observer, Observers
from fedhead.server.report.journal import Journal
from fedhead.server.runs.checkpoint import Checkpoint, require_same_run
from fedhead.server.runs.folder import RunFolder
from fedhead.server.runs.result import CompletedRun
from fedhead.server.runs.worth import write_worth_if_possible
from fedhead.server.site_sums import SiteSums


class Prepared(Protocol):
    """A run whose settings, data and backbone were checked."""

    @property
    def config(self) -> RunConfig:
        """The run, including everything that its data decides."""

    @property
    def backbone(self) -> Backbone:
        """The frozen part."""

    @property
    def strategy(self) -> Strategy:
        """Flower's, or the user's own."""

    @property
    def name(self) -> str:
        """The end of a new run folder's name."""

    @property
    def release_steps(self) -> Sequence[str] | None:
        """A sentence for each step that all sites' replies pass; None if each site has its own."""


@dataclass(frozen=True)
class RunParts:
    """The parts of a run folder that the coordinator writes.

    Attributes:
        path: the run folder.
        observer: writes metrics and journal, and informs the caller's observers.
        sums: where each site's statistics are kept, if anywhere.
        checkpoint: where the run is saved, and resumed from.
    """

    path: Path
    observer: Observer
    sums: SiteSums | None
    checkpoint: Checkpoint


P = TypeVar("P", bound=Prepared)
R = TypeVar("R", bound=CompletedRun)


def execute(
    config: RunConfig | None,
    prepare: Callable[[RunConfig], P],
    run: Callable[[P, RunParts], R],
    *,
    simulated: bool,
    out: Path | str | None = None,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    baseline: Callable[[P], Mapping[str, Any] | None] = lambda prepared: None,
) -> R:
    """Make or reopen a run folder, lock it, run, and write the result.

    Args:
        config: the run; by default the defaults, or those of the resumed run.
        prepare: checks the run, before a folder is made.
        run: runs it.
        simulated: whether the sites are simulated.
        out: the run folder; by default a new one under `runs/`.
        resume: whether to resume the run in `out`.
        observers: informed of events.
        baseline: returns the figures of a backbone to compare with, if asked for; runs before anything else.

    Raises:
        UserError: if something asked for does not exist or does not fit; before anything is run.
        FedheadError: if the run fails.
    """
    folder: RunFolder | None = None
    saved: RunConfig | None = None
    if resume:
        if out is None:
            raise UserError("Resuming needs the folder of the run, as out.")
        folder, saved = RunFolder.open(out)
    prepared = prepare(config or saved or RunConfig())
    if folder is None or saved is None:
        folder = RunFolder.create(out, prepared.name)
    else:
        require_same_run(prepared.config, saved, folder.path)
    journal = Journal(folder.path, prepared.backbone, simulated=simulated, release_steps=prepared.release_steps)
    observer = Observers([folder, journal, *observers])
    try:
        with locked_folder(folder.path):
            folder.write_config(prepared.config)
            compared = baseline(prepared)
            observer.on_started(prepared.config, folder.path)
            result = _run_in(folder, prepared, run, observer, compared, every_round=not simulated)
        observer.on_finished(result.outcome)
    except BaseException as error:
        observer.on_failed(error)
        # After a failure on a network, the folder says which sites were missing.
        if simulated and not resume:
            folder.discard_if_unused()
        raise
    return result


def _run_in(
    folder: RunFolder,
    prepared: P,
    run: Callable[[P, RunParts], R],
    observer: Observer,
    compared: Mapping[str, Any] | None,
    *,
    every_round: bool,
) -> R:
    """Run to the end, and write model, evaluation and result."""
    config = prepared.config
    checkpoint = Checkpoint(folder, config, prepared.backbone, prepared.strategy, every_round=every_round)
    sums = None if config.keep_sums == "total" else folder.sums
    result = run(prepared, RunParts(folder.path, observer, sums, checkpoint))
    folder.sums.finish()
    folder.write_model(result.model, result.config)
    folder.write_tail(result.outcome)
    folder.write_adaptation(result.model, result.outcome)
    folder.write_evaluation(result.outcome, result.config, compared)
    result.write_to(folder.path)
    if result.config != config:
        folder.write_config(result.config)
    checkpoint.remove()
    if config.worth:
        write_worth_if_possible(folder.path)
    return result
