"""`simulate(config, data, sites) -> RunResult`: many sites on one machine, by the real coordinator and apps."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.weights import weights_path
from fedhead.client.guard import Guard, Ledger
from fedhead.client.site_data import Holding, check_backbone, hold, refuse_if_withheld
from fedhead.client.training import LabelledFeatures
from fedhead.config import RunConfig
from fedhead.data import IntArray, Samples, held_out, load_samples, load_sites, relabel, require_kind, require_labels
from fedhead.devices import pick_device
from fedhead.errors import FedheadError, UserError
from fedhead.features import FeatureStore, Progress
from fedhead.files import locked_folder
from fedhead.flower import in_process_identity
from fedhead.heads import Head, make_head
from fedhead.losses import loss_for
from fedhead.messages import Manifest, WeightsChunk
from fedhead.metrics import EvaluationReport, EvaluationSums, report
from fedhead.model import TransferModel
from fedhead.server.checkpoint import Checkpoint, require_same_run
from fedhead.server.coordinator import Coordinator
from fedhead.server.history import Outcome, Round
from fedhead.server.observer import Observer, Observers
from fedhead.server.report.journal import Journal
from fedhead.server.run_folder import RunFolder
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import UNSOLVED, resolve_init
from fedhead.server.strategies import build_strategy
from fedhead.simulations.grid import InProcessGrid
from fedhead.simulations.partition import check_rows, divide
from fedhead.statistics import MAX_WIDTH

logger = logging.getLogger(__name__)

SUMS_BYTES = 2 * 2**30
"""Each site's own sums are kept by default up to so much."""

_COUNTED_AT_ONCE = 50_000
"""Of so many sites at a time it is counted what their guards leave."""


@dataclass(frozen=True)
class RunResult:
    """What a simulated run gives.

    Attributes:
        config: what ran, with nothing left to defaults that data decides.
        model: the model that the run delivers.
        outcome: history, per-site scores, refusals and traffic.
        test_accuracy: of the delivered model on the pooled test set; None without one.
        empty_sites: sites that the partition left without rows; they took no part.
        skipped: why each unreadable row was skipped, by row.
        withheld: how many rows each site's guard withheld, where it did.
        extracted: rows that the backbone ran over; the others' features were there.
        seconds: of extraction, of the rounds, and of everything, by name.
        run_dir: the run folder, where there is one.
    """

    config: RunConfig
    model: TransferModel
    outcome: Outcome
    test_accuracy: float | None
    empty_sites: tuple[str, ...]
    skipped: Mapping[int, str]
    withheld: Mapping[str, int]
    extracted: int
    seconds: Mapping[str, float]
    run_dir: Path | None

    @property
    def history(self) -> Sequence[Round]:
        """Every head of the run, from the one it starts from."""
        return self.outcome.history

    @property
    def sites(self) -> Mapping[str, EvaluationSums]:
        """What each site with held-out rows counted of the kept head on them."""
        return self.outcome.sites

    @cached_property
    def evaluation(self) -> EvaluationReport:
        """How the kept head does on the pooled held-out rows, with 95 % intervals."""
        nothing = EvaluationSums.zeros(len(self.config.classes), multi_label=self.config.multi_label)
        pooled = sum(self.sites.values(), nothing)
        return report(pooled, self.config.classes)

    @property
    def accuracy(self) -> float | None:
        """On the pooled test set where there is one, else on the pooled held-out rows; None without either."""
        return self.test_accuracy if self.test_accuracy is not None else self.accuracy_held_out

    @property
    def accuracy_held_out(self) -> float | None:
        """The kept head on the sites' held-out rows, pooled."""
        return self.evaluation.accuracy.value

    @property
    def accuracy_one_exchange(self) -> float | None:
        """The head solved from statistics, as `accuracy` is measured; None if it was not solved."""
        if self.outcome.statistics is None:
            return None
        first = self.history[0]
        return first.test_accuracy if first.test_accuracy is not None else first.accuracy

    @property
    def accuracy_after_rounds(self) -> float | None:
        """The last head, as `accuracy` is measured; None without rounds."""
        last = self.history[-1]
        if last.number == 0:
            return None
        return last.test_accuracy if last.test_accuracy is not None else last.accuracy

    @property
    def accuracy_by_site(self) -> dict[str, float]:
        """The kept head on each site's held-out rows."""
        return {name: sums.correct / sums.rows for name, sums in self.sites.items()}

    @property
    def accuracy_mean_site(self) -> float | None:
        """The mean over sites."""
        return float(np.mean(list(self.accuracy_by_site.values()))) if self.sites else None

    @property
    def accuracy_worst_site(self) -> float | None:
        """The least over sites."""
        return min(self.accuracy_by_site.values(), default=None)

    @property
    def bytes_down(self) -> int:
        """Payload from the coordinator to all sites."""
        return sum(finished.bytes_down for finished in self.history)

    @property
    def bytes_up(self) -> int:
        """Payload from all sites to the coordinator."""
        return sum(finished.bytes_up for finished in self.history)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run as plain values."""
        return {
            "accuracy": self.accuracy,
            "accuracy_held_out": self.accuracy_held_out,
            "accuracy_test": self.test_accuracy,
            "accuracy_one_exchange": self.accuracy_one_exchange,
            "accuracy_after_rounds": self.accuracy_after_rounds,
            "accuracy_mean_site": self.accuracy_mean_site,
            "accuracy_worst_site": self.accuracy_worst_site,
            "rounds": self.config.rounds,
            "kept_round": self.outcome.kept_round,
            "sites": len(self.outcome.participants),
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "bytes_full_model": self.outcome.full_model_bytes,
            "seconds": self.seconds["total"],
            "seconds_extraction": self.seconds["extraction"],
            "seconds_rounds": self.seconds["rounds"],
            "rows_extracted": self.extracted,
            "rows_skipped": len(self.skipped),
            "rows_withheld": sum(self.withheld.values()),
            "sites_empty": list(self.empty_sites),
            "sites_refused": dict(self.outcome.refused),
            "run_dir": str(self.run_dir) if self.run_dir else None,
        }


class SharedData:
    """What all simulated sites of a process share: one backbone, and one store of features.

    Args:
        backbone: of the run.
        store: the features of all rows.
        labels: `[N]` or `[N, C]`, of all rows.
        guard: every site's.
    """

    def __init__(self, backbone: Backbone, store: FeatureStore, labels: IntArray, guard: Guard) -> None:
        self.backbone = backbone
        self.labels = labels
        self.keys = store.keys
        self.guard = guard
        device = backbone.device
        self.data = LabelledFeatures(store.features.to(device), torch.from_numpy(labels).to(device))
        self._compared: Tensor | None = None

    @cached_property
    def probe(self) -> Tensor:
        """The features of the probe."""
        return self.backbone.probe()

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        """Check the backbone against the coordinator's, for all sites once."""
        if probe is not self._compared:
            check_backbone(self.backbone, self.probe, manifest, probe)
            self._compared = probe

    def count_allowed(self, sites: Sequence[IntArray], config: RunConfig) -> IntArray:
        """Return `[S]`, how many of its rows the guard leaves each site; 0 where it refuses the site as a whole."""
        out = held_out(self.keys, config.holdout, config.seed)
        allowed = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(sites), _COUNTED_AT_ONCE):
            part = sites[start : start + _COUNTED_AT_ONCE]
            owners, rows = np.repeat(np.arange(len(part)), [len(own) for own in part]), np.concatenate(part)
            allowed.append(self.guard.count_allowed(owners, self.labels[rows], out[rows], len(part)))
        return np.concatenate(allowed)


class SimulatedSite:
    """A site that is a list of row numbers; like a new machine, it lacks every backbone the package does not carry.

    It keeps no ledger: nothing leaves this process.

    Args:
        name: of the site.
        rows: `[n]`, its rows of the shared data.
        shared: the same for all sites.
        allowed: how many of the rows the guard leaves, if that was counted.
    """

    ledger: Ledger | None = None

    def __init__(self, name: str, rows: IntArray, shared: SharedData, allowed: int = 0) -> None:
        self.name = name
        self.num_rows = len(rows)
        self.num_allowed = allowed
        self._rows = rows
        self._shared = shared
        self._has_weights = shared.backbone.spec.startswith("bundled:") and shared.backbone.trained
        self._holding: Holding | None = None

    def has_weights(self, manifest: Manifest) -> bool:
        return self._has_weights

    def install(self, manifest: Manifest, chunk: WeightsChunk) -> int | None:
        received = chunk.offset + len(chunk.data)
        if received < chunk.size:
            return received
        # The coordinator of this machine has written the file that a site would keep.
        if not weights_path(manifest.weights_digest).is_file():
            raise FedheadError(f"The weights that were sent to {self.name} are not there.")
        self._has_weights = True
        return None

    def check_data(self, manifest: Manifest) -> None:
        """Check nothing: `make_plan` has looked at all sites' data."""

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        self._shared.check(manifest, probe)
        if not self.num_allowed:
            refuse_if_withheld(self.open(manifest).guarded)

    def open(self, manifest: Manifest) -> Holding:
        if self._holding is None:
            shared = self._shared
            self._holding = hold(self.name, self._rows, shared.data, shared.labels, shared.keys, manifest, shared.guard)
        return self._holding


def simulate(
    config: RunConfig | None = None,
    data: str | Samples | None = None,
    sites: int | Sequence[npt.ArrayLike] | None = None,
    *,
    test_data: str | Samples | None = None,
    shared_rows: bool = False,
    strategy: Strategy | None = None,
    apps: Mapping[str, ClientApp] | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    baseline: str | None = None,
    on_extraction: Progress = lambda done, total: None,
    observers: Sequence[Observer] = (),
) -> RunResult:
    """Run `config` over simulated sites in this process.

    Args:
        config: the run; `RunConfig()` by default.
        data: overrides `config.simulation.data`; may be samples in memory.
        sites: overrides `config.simulation.sites`; may be each site's own row numbers, instead of a partition.
        test_data: overrides `config.simulation.test_data`; a pooled test set beside the sites' held-out rows.
        shared_rows: whether several sites may hold the same row, where `sites` are row numbers.
        strategy: a Flower `Strategy` of your own, instead of `config.strategy`.
        apps: `ClientApp`s of sites that do not run fedhead's, by site name.
        out: the run folder; by default a new one under `runs/`.
        resume: whether to go on with the run in `out`, of which a process was killed or failed. `config` may be left
            out then; `data`, `sites` and `strategy` that were given to it must be given again.
        baseline: a backbone that the report compares with, by the head of one exchange on the same sites.
        on_extraction: called with rows done and rows in all.
        observers: are told of what happens.

    Raises:
        UserError: if something asked for does not exist or does not fit; before anything is run.
        FedheadError: if the run fails.
    """
    if resume:
        if out is None:
            raise UserError("Resuming needs the folder of the run, as out.")
        folder, saved = RunFolder.open(out)
        plan = make_plan(config or saved, data, sites, test_data=test_data, shared_rows=shared_rows, strategy=strategy)
        require_same_run(plan.config, saved, folder.path)
    else:
        plan = make_plan(
            config or RunConfig(), data, sites, test_data=test_data, shared_rows=shared_rows, strategy=strategy
        )
        folder = RunFolder.create(out, _run_name(plan))
    observer = Observers([folder, Journal(folder.path, plan.backbone, simulated=True), *observers])
    try:
        with locked_folder(folder.path):
            result = _write_run(plan, folder, observer, apps, on_extraction, baseline)
        observer.on_finished(result.outcome)
        return result
    except BaseException as error:
        observer.on_failed(error)
        if not resume:
            folder.discard_if_unused()
        raise


def _write_run(
    plan: "Plan",
    folder: RunFolder,
    observer: Observer,
    apps: Mapping[str, ClientApp] | None,
    on_extraction: Progress,
    baseline: str | None,
) -> RunResult:
    """Run what was planned, from the start or from where its folder says, and write everything to the folder."""
    folder.write_config(plan.config)
    compared = run_baseline(plan, baseline) if baseline else None
    observer.on_started(plan.config, folder.path)
    checkpoint = Checkpoint(folder, plan.config, plan.backbone, plan.strategy, every_round=False)
    result = run_plan(
        plan,
        apps=apps,
        run_dir=folder.path,
        on_extraction=on_extraction,
        observer=observer,
        sums=None if plan.config.keep_sums == "total" else folder.sums,
        checkpoint=checkpoint,
    )
    folder.sums.finish()
    folder.write_model(result.model, result.config)
    folder.write_evaluation(result.outcome, result.config, compared)
    folder.write_result(result.summary())
    checkpoint.remove()
    return result


@dataclass(frozen=True)
class Plan:
    """Everything that can be known, and refused, before anything is run."""

    config: RunConfig
    strategy: Strategy
    backbone: Backbone
    samples: Samples
    labels: IntArray
    test_samples: Samples | None
    test_labels: IntArray | None
    own_rows: Mapping[str, IntArray] | None

    def assign(self, readable: IntArray) -> dict[str, IntArray]:
        """Return each site's rows of those that are readable."""
        if self.own_rows is not None:
            if len(readable) == len(self.samples):
                return {name: np.sort(rows) for name, rows in self.own_rows.items()}
            return {name: np.intersect1d(rows, readable) for name, rows in self.own_rows.items()}
        table = self.config.simulation
        owners = None if self.samples.sites is None else [self.samples.sites[row] for row in readable]
        parts = divide(table.partition, self.labels[readable], table.sites, self.config.seed, owners)
        return {name: readable[part] for name, part in parts.items()}


def make_plan(
    config: RunConfig,
    data: str | Samples | None = None,
    sites: int | Sequence[npt.ArrayLike] | None = None,
    *,
    test_data: str | Samples | None = None,
    shared_rows: bool = False,
    strategy: Strategy | None = None,
) -> Plan:
    """Load and check everything that `simulate` needs; see there.

    Raises:
        UserError: if something asked for does not exist or does not fit.
    """
    given = _override(config, data=data, sites=sites, test_data=test_data)
    table = given.simulation
    if table.engine == "ray":
        from fedhead.simulations.ray_engine import require_ray

        require_ray()
    strategy = strategy or build_strategy(given.strategy)
    device = pick_device(table.device)
    load_data = load_sites if table.partition.partition(":")[0] == "folder" else load_samples
    samples = data if isinstance(data, Samples) else load_data(table.data)
    test_samples = test_data if isinstance(test_data, Samples) else None
    if test_samples is None and table.test_data:
        test_samples = load_samples(table.test_data)
    for loaded in (samples, test_samples):
        if loaded is not None:
            require_labels(loaded, given.multi_label)
    classes = given.classes or (load_samples(given.classes_from).classes if given.classes_from else samples.classes)
    backbone = load_backbone(given.backbone, weights=given.weights, layer=given.layer, seed=given.seed).to(device)
    for loaded in (samples, test_samples):
        if loaded is not None:
            require_kind(backbone.spec, backbone.kind, loaded.kind)
    if not backbone.trained:
        logger.warning("The weights of %s are random, as asked for: nothing is transferred.", backbone.spec)
    init = resolve_init(given, make_head(given.head, backbone.num_features, len(classes)))
    given = _sums_that_fit(given.changed({"init": init}), backbone.num_features)
    plan = Plan(
        config=given.changed(
            {
                "backbone": backbone.spec,
                "init": init,
                "classes": list(classes),
                "classes_from": "",
                "weights": _absolute(given.weights),
                "simulation": {"data": samples.spec, "test_data": test_samples.spec if test_samples else ""},
            }
        ),
        strategy=strategy,
        backbone=backbone,
        samples=samples,
        labels=relabel(samples, classes),
        test_samples=test_samples,
        test_labels=_test_labels(test_samples, samples, classes) if test_samples else None,
        own_rows=None if sites is None or isinstance(sites, int) else check_rows(sites, len(samples), shared_rows),
    )
    plan.assign(np.arange(len(samples)))
    return plan


def run_plan(
    plan: Plan,
    *,
    apps: Mapping[str, ClientApp] | None = None,
    run_dir: Path | None = None,
    deliver: bool = True,
    on_extraction: Progress = lambda done, total: None,
    observer: Observer | None = None,
    sums: SiteSums | None = None,
    checkpoint: Checkpoint | None = None,
) -> RunResult:
    """Run what was planned, and write nothing but features; see `simulate`.

    Raises:
        FedheadError: if the run fails.
    """
    started = time.perf_counter()
    config, backbone = plan.config, plan.backbone
    if apps and config.simulation.engine != "process":
        raise UserError("Apps of sites' own run in this process: leave simulation.engine at 'process'.")
    store, test_store = _extract(plan, on_extraction)
    guard = Guard(config.simulation.min_class_count, config.simulation.min_rows)
    shared = SharedData(backbone, store, plan.labels, guard)
    assigned = plan.assign(store.readable())
    empty = tuple(name for name, rows in assigned.items() if len(rows) == 0)
    if empty:
        logger.warning("%d sites have no rows and take no part: %s.", len(empty), ", ".join(empty[:5]))
    if apps:
        logger.warning("%d sites run apps of their own, one at a time: %s.", len(apps), ", ".join(sorted(apps)[:5]))
    held = {name: rows for name, rows in assigned.items() if len(rows)}
    allowed = dict(zip(held, shared.count_allowed(list(held.values()), config).tolist(), strict=True))
    present = [SimulatedSite(name, rows, shared, allowed[name]) for name, rows in held.items()]
    test = None
    if test_store is not None and plan.test_labels is not None:
        test = _accuracy_on(test_store, torch.from_numpy(plan.test_labels))

    extracted_at = time.perf_counter()

    def coordinate(grid: Grid) -> Outcome:
        coordinator = Coordinator(
            config,
            grid,
            backbone,
            config.classes,
            plan.strategy,
            observer=observer,
            sums=sums,
            test=test,
            checkpoint=checkpoint,
            deliver=deliver,
        )
        return coordinator.run()

    if config.simulation.engine == "ray":
        from fedhead.simulations.ray_engine import run_on_ray

        rows = [assigned[site.name] for site in present]
        outcome = run_on_ray(config, [site.name for site in present], rows, plan.labels, store, coordinate)
    else:
        with in_process_identity(run_id=1):
            outcome = coordinate(InProcessGrid(present, apps))
    ended = time.perf_counter()
    return RunResult(
        config=config,
        model=outcome.model(backbone.to(torch.device("cpu")), config),
        outcome=outcome,
        test_accuracy=test(outcome.head) if test else None,
        empty_sites=empty,
        skipped=store.skipped,
        withheld={name: len(rows) - allowed[name] for name, rows in held.items() if len(rows) > allowed[name]},
        extracted=store.extracted + (test_store.extracted if test_store else 0),
        seconds={"extraction": extracted_at - started, "rounds": ended - extracted_at, "total": ended - started},
        run_dir=run_dir,
    )


def run_baseline(plan: Plan, backbone: str) -> dict[str, Any]:
    """Return how the head of one exchange does on another backbone, over the same sites and held-out rows.

    Raises:
        UserError: if there is no such backbone.
        FedheadError: if the run fails.
    """
    init = "ridge" if plan.config.multi_label else "lda"
    changes = {"backbone": backbone, "weights": "default", "layer": "penultimate", "head": "linear", "init": init}
    config = plan.config.changed({**changes, "rounds": 0, "diagnose": False, "strategy": {"name": "FedAvg"}})
    other = load_backbone(backbone, seed=config.seed).to(plan.backbone.device)
    compared = replace(plan, config=config, strategy=build_strategy(config.strategy), backbone=other)
    result = run_plan(compared, deliver=False)
    return {
        "backbone": backbone,
        "accuracy": result.evaluation.accuracy.to_list(),
        "accuracy_test": result.test_accuracy,
    }


def _extract(plan: Plan, on_extraction: Progress) -> tuple[FeatureStore, FeatureStore | None]:
    """Open the stores of the sites' data and of the test set, counted together."""
    table = plan.config.simulation
    wanted = [samples for samples in (plan.samples, plan.test_samples) if samples is not None]
    total = sum(map(len, wanted))
    stores: list[FeatureStore] = []
    before = 0

    def progress(done: int, _: int) -> None:
        on_extraction(before + done, total)

    for samples in wanted:
        stores.append(
            FeatureStore.open(
                plan.backbone, samples, strict=table.strict_data, precision=table.precision, progress=progress
            )
        )
        before += len(samples)
    on_extraction(total, total)
    return stores[0], stores[1] if len(stores) == 2 else None


def _test_labels(test: Samples, samples: Samples, classes: Sequence[str]) -> IntArray:
    """Return the test set's labels; say so where it has rows of a class that no site has any of."""
    try:
        labels = relabel(test, classes)
    except UserError as error:
        raise UserError(
            f"In the test data, {error} No site has rows of that class: mend or remove the test rows."
        ) from None
    unseen = _held(test) & set(classes) - _held(samples)
    if unseen:
        logger.warning(
            "The test data has rows of classes that no site has any of, and no head can know: %s.",
            ", ".join(sorted(unseen)),
        )
    return labels


def _held(samples: Samples) -> set[str]:
    """Return the classes that have rows."""
    held = samples.labels.any(0) if samples.multi_label else np.bincount(samples.labels, minlength=len(samples.classes))
    return {samples.classes[label] for label in np.flatnonzero(held)}


def _override(
    config: RunConfig,
    data: str | Samples | None,
    sites: int | Sequence[npt.ArrayLike] | None,
    test_data: str | Samples | None,
) -> RunConfig:
    changes = {
        "data": data.spec if isinstance(data, Samples) else data,
        "test_data": test_data.spec if isinstance(test_data, Samples) else test_data,
        "sites": sites if sites is None or isinstance(sites, int) else len(sites),
    }
    return config.changed({"simulation": {key: value for key, value in changes.items() if value is not None}})


def _run_name(plan: Plan) -> str:
    """Return what a run folder is called: backbone and data, without the folders and settings that they name."""
    source, _, name = plan.backbone.spec.partition(":")
    name = Path(name.partition("?")[0]).name
    return "-".join((source, re.sub(r"[^\w.-]+", "-", name), plan.samples.spec.partition(":")[0]))


def _sums_that_fit(config: RunConfig, num_features: int) -> RunConfig:
    """Return the run with sums pooled at once where nobody asked for each site's, and they would fill the disk."""
    width = min(num_features, MAX_WIDTH)
    needed = config.simulation.sites * width * (width + 1) // 2 * 8
    if "keep_sums" in config.model_fields_set or config.init in UNSOLVED or needed <= SUMS_BYTES:
        return config
    logger.warning(
        "The sums of %d sites would take %.0f GB: only their total is made. Sites cannot join or leave this run later, "
        "and are not diagnosed; --keep-sums folder keeps them.",
        config.simulation.sites,
        needed / 1e9,
    )
    return config.changed({"keep_sums": "total"})


def _absolute(weights: str) -> str:
    return weights if weights in ("default", "random") else str(Path(weights).resolve())


def _accuracy_on(store: FeatureStore, labels: Tensor) -> Callable[[Head], float]:
    rows = torch.from_numpy(store.readable())

    @torch.inference_mode()
    def accuracy(head: Head) -> float:
        correct = 0
        for part in torch.split(rows, 8192):
            logits = head(store.features[part])
            correct += int(loss_for(logits, labels).correct(logits, labels[part]).sum())
        return correct / len(rows)

    return accuracy
