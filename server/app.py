"""The Flower `ServerApp`: reads the `RunConfig`, calls the coordinator."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone, load_backbone
from fedhead.config import GENERATION, GENERATION_COLUMNS, RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.secure.roster import Roster
from fedhead.server.flower_app import from_run_config
from fedhead.server.kinds import coordinator_for
from fedhead.server.observer import Observer
from fedhead.server.privacy import private_settings
from fedhead.server.runs.execute import RunParts, execute
from fedhead.server.runs.log import RunLog
from fedhead.server.runs.result import CompletedRun
from fedhead.server.strategies import build_strategy
from fedhead.tasks import make_task, tasks
from fedhead.tasks.clusters import EVERY_ROW
from fedhead.tasks.dense import require_rows


@dataclass(frozen=True)
class Preparation:
    """A run over real sites whose settings and backbone were checked.

    Attributes:
        config: the run, with the names of its classes.
        backbone: on the CPU.
        strategy: Flower's.
    """

    config: RunConfig
    backbone: Backbone
    strategy: Strategy

    @property
    def name(self) -> str:
        """The end of a new run folder's name."""
        return self.backbone.spec.replace(":", "-")

    @property
    def release_steps(self) -> None:
        """None, as each site has its own."""


def prepare(config: RunConfig) -> Preparation:
    """Load and check everything that a run over real sites needs at the coordinator.

    Raises:
        UserError: if the configuration names no classes, or something that does not exist or fit.
    """
    config = with_classes(config).settled()
    strategy = build_strategy(config.strategy)
    config = private_settings(config, strategy)
    if config.privacy.on and config.privacy.noise == "shared" and not config.privacy.secure_sum:
        raise UserError(
            "Real sites share the noise of a private run under secure summation only: set secure_sum = true under "
            '[privacy] (--secure-sum), or noise = "own" (--noise own), which is more noise.'
        )
    backbone = load_backbone(config.backbone, weights=config.weights, layer=config.layer, seed=config.seed)
    require_rows(tasks[config.task], backbone.geometry)
    return Preparation(config, backbone, strategy)


def coordinate(
    config: RunConfig | None,
    grid: Grid,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    members: Roster | None = None,
) -> CompletedRun:
    """Run `config` over the sites of `grid`, and write its run folder.

    Args:
        config: the run; its `simulation` table is not read. May be left out where a run is resumed.
        grid: where the sites are.
        out: the run folder; by default a new one under `runs/`.
        resume: whether to resume the run in `out`, whose process was killed or failed.
        observers: informed of events.
        members: the signed keys of the sites, for secure summation.

    Raises:
        UserError: if the configuration names no classes, or something that does not exist or fit.
        FedheadError: if the run fails.
    """

    def prepared_run(config: RunConfig) -> Preparation:
        prepared = prepare(config)
        if prepared.config.privacy.secure_sum:
            if members is None:
                raise UserError(
                    "Secure summation needs roster.toml in the coordinator's kit: the sites' keys, signed by the "
                    "consortium's authority with fedhead roster sign."
                )
            members.verify()
        return prepared

    def run(prepared: Preparation, parts: RunParts) -> CompletedRun:
        config = prepared.config
        coordinator = coordinator_for(config)(
            config,
            grid,
            prepared.backbone,
            config.classes,
            prepared.strategy,
            observer=parts.observer,
            sums=parts.sums,
            checkpoint=parts.checkpoint,
            members=members,
        )
        outcome = coordinator.run()
        decided = config.changed(outcome.settled)
        model = outcome.model(prepared.backbone, decided)
        return CompletedRun(config=decided, model=model, outcome=outcome, run_dir=parts.path)

    informed = [RunLog(), *observers]
    return execute(config, prepared_run, run, simulated=False, out=out, resume=resume, observers=informed)


def with_classes(config: RunConfig) -> RunConfig:
    """Return the configuration with the names of its classes in it.

    Raises:
        UserError: if it says nothing of them.
    """
    classes = config.classes
    if config.task == "clusters":
        classes = (EVERY_ROW,)
    if config.task == GENERATION:
        classes = GENERATION_COLUMNS
    if not classes and config.classes_from:
        classes = tasks[config.task].columns_of(load_samples(config.classes_from))
    if not classes:
        named = "targets" if tasks[config.task].kind.real else "classes"
        raise UserError(f"A run over real sites needs {named} = [...] (or classes_from), since their data is not here.")
    columns = make_task(config.task, classes).columns
    return config.changed({"classes": list(columns), "classes_from": ""})


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the run that the run config describes, into its `out`, a folder on the SuperLink's machine."""
    config = from_run_config(context.run_config)
    out = context.run_config.get("out")
    coordinate(config, grid, str(out) if out else None)
