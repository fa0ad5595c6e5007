"""The Flower `ServerApp`: reads the `RunConfig`, calls the coordinator."""

from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone, load_backbone
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.files import locked_folder
from fedhead.server.checkpoint import Checkpoint, require_same_run
from fedhead.server.coordinator import Coordinator
from fedhead.server.flower_app import from_run_config
from fedhead.server.history import Outcome
from fedhead.server.observer import Observer, Observers
from fedhead.server.report.journal import Journal
from fedhead.server.run_folder import RunFolder
from fedhead.server.strategies import build_strategy


def coordinate(
    config: RunConfig | None,
    grid: Grid,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    observers: Sequence[Observer] = (),
) -> tuple[Outcome, RunFolder]:
    """Run `config` over the sites of `grid`, and write its run folder.

    Args:
        config: the run; its `simulation` table is not read. May be left out where a run is resumed.
        grid: where the sites are.
        out: the run folder; by default a new one under `runs/`.
        resume: whether to go on with the run in `out`, of which a process was killed or failed.
        observers: are told of what happens.

    Raises:
        UserError: if the configuration names no classes, or something that does not exist or fit.
        FedheadError: if the run fails.
    """
    if resume:
        if out is None:
            raise UserError("Resuming needs the folder of the run, as out.")
        folder, saved = RunFolder.open(out)
        config = with_classes(config or saved)
        require_same_run(config, saved, folder.path)
    else:
        config = with_classes(config or RunConfig())
    strategy = build_strategy(config.strategy)
    backbone = load_backbone(config.backbone, weights=config.weights, layer=config.layer, seed=config.seed)
    if not resume:
        folder = RunFolder.create(out, backbone.spec.replace(":", "-"))
    observer = Observers([folder, Journal(folder.path, backbone), *observers])
    try:
        with locked_folder(folder.path):
            outcome = _write_run(config, grid, folder, backbone, strategy, observer)
        observer.on_finished(outcome)
    except BaseException as error:
        observer.on_failed(error)
        raise
    return outcome, folder


def _write_run(
    config: RunConfig, grid: Grid, folder: RunFolder, backbone: Backbone, strategy: Strategy, observer: Observer
) -> Outcome:
    """Run from the start, or from where the folder says, and write everything to the folder."""
    folder.write_config(config)
    observer.on_started(config, folder.path)
    checkpoint = Checkpoint(folder, config, backbone, strategy, every_round=True)
    outcome = Coordinator(
        config,
        grid,
        backbone,
        config.classes,
        strategy,
        observer=observer,
        sums=None if config.keep_sums == "total" else folder.sums,
        checkpoint=checkpoint,
    ).run()
    folder.sums.finish()
    folder.write_model(outcome.model(backbone, config), config)
    folder.write_evaluation(outcome, config)
    folder.write_result(
        {
            "accuracy": outcome.history[outcome.kept_round].accuracy,
            "kept_round": outcome.kept_round,
            "sites": len(outcome.participants),
            "sites_refused": dict(outcome.refused),
            "bytes_full_model": outcome.full_model_bytes,
        }
    )
    checkpoint.remove()
    return outcome


def with_classes(config: RunConfig) -> RunConfig:
    """Return the configuration with the names of its classes in it.

    Raises:
        UserError: if it says nothing of them.
    """
    classes = config.classes or (load_samples(config.classes_from).classes if config.classes_from else ())
    if not classes:
        raise UserError("A run over real sites needs classes = [...] (or classes_from), since their data is not here.")
    return config.changed({"classes": list(classes), "classes_from": ""})


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config describes, into its `out`: a folder on the SuperLink's machine."""
    config = from_run_config(context.run_config)
    out = context.run_config.get("out")
    coordinate(config, grid, str(out) if out else None)
