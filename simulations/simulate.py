"""`simulate(config, data, sites) -> RunResult`: many sites on one machine, by the real coordinator and apps."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedhead.backbones import load_backbone
from fedhead.backbones.identity import identity_for
from fedhead.backbones.objectives import Cut
from fedhead.client.release.guard import labels_of
from fedhead.client.release.subgroups import Subgroups
from fedhead.client.tails import Tuning
from fedhead.config import DENSE_LAYERS, GENERATION, RunConfig, TuneConfig
from fedhead.data import IntArray, Samples
from fedhead.errors import UserError
from fedhead.features.activations import Activations, open_activations
from fedhead.features.blocks import Extract, extract_blocks
from fedhead.features.store import FeatureStore, Progress
from fedhead.flower import in_process_identity
from fedhead.heads import Head, TunedHead
from fedhead.server.kinds import coordinator_for
from fedhead.server.observer import Observer
from fedhead.server.runs.execute import RunParts, execute
from fedhead.server.runs.history import Outcome
from fedhead.server.strategies import build_strategy
from fedhead.server.tuned_form import cut
from fedhead.simulations.blocks import count_blocks
from fedhead.simulations.cluster import connected, run_on_ray
from fedhead.simulations.cluster_extraction import extract_on_ray
from fedhead.simulations.examples import examples
from fedhead.simulations.flower_engine import run_on_flower
from fedhead.simulations.grid import InProcessGrid
from fedhead.simulations.plan import Inputs, Plan, make_plan
from fedhead.simulations.result import RunResult
from fedhead.simulations.sites import SharedData, SimulatedSite
from fedhead.simulations.worker import Shared
from fedhead.tasks import Task, make_task
from fedhead.tasks.dense import ItemPlaces
from fedhead.wording import counted, listed

logger = logging.getLogger(__name__)

RUN_ID = 1

OWN_ADAPTERS = "site-adapters"
"""Folder in a run's folder with the adapters that would stay at each site."""


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
    attack: Literal["", "membership", "audit"] = "",
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
        resume: whether to resume the run in `out`, whose process was killed or failed. `config` may be left
            out then; `data`, `sites` and `strategy` that were given to it must be given again.
        baseline: a backbone that the report compares with, by the head of one exchange on the same sites.
        attack: `membership` to attack heads like the run's; the report shows how well it detects training rows.
            `audit` to measure a lower bound of a private run's epsilon by canaries.
        on_extraction: called with rows done and rows in all.
        observers: notified of the run's events.

    Raises:
        UserError: if something asked for does not exist or does not fit; before anything is run.
        FedheadError: if the run fails.
    """
    if baseline and config is not None and config.privacy.on:
        raise UserError("A private run has no baseline: exact figures of another backbone would tell of the same rows.")
    if baseline and config is not None and config.task in (*DENSE_LAYERS, GENERATION):
        raise UserError(f"A run of the task {config.task!r} has no baseline: leave it out, and compare two runs.")
    if attack == "audit" and (config is None or not config.privacy.on):
        raise UserError("An audit measures the epsilon of a differentially private run: set epsilon.")
    inputs = Inputs(data, sites, test_data, shared_rows, strategy)
    return execute(
        config,
        lambda given: make_plan(given, inputs),
        lambda plan, parts: run_plan(plan, apps=apps, parts=parts, attack=attack, on_extraction=on_extraction),
        simulated=True,
        out=out,
        resume=resume,
        observers=observers,
        baseline=lambda plan: run_baseline(plan, baseline) if baseline else None,
    )


def run_plan(
    plan: Plan,
    *,
    apps: Mapping[str, ClientApp] | None = None,
    parts: RunParts | None = None,
    deliver: bool = True,
    attack: Literal["", "membership", "audit"] = "",
    on_extraction: Progress = lambda done, total: None,
) -> RunResult:
    """Run a plan; see `simulate`. Without the parts of a run folder, only features are written.

    Raises:
        FedheadError: if the run fails.
    """
    started = time.perf_counter()
    config = plan.config
    if apps:
        _require_plain_process(config)
    store, test_store = _extract(plan, on_extraction)
    if parts is not None:
        parts.checkpoint.data = _data_digest(plan, store, test_store)
    task = make_task(config.task, config.classes)
    made = cut(plan.backbone, config) if config.tune.on else None
    tuning, test_rows = _tuning(plan, store, test_store, made)
    shared = _shared(plan, store, task, tuning, parts.path / OWN_ADAPTERS if parts is not None else None)
    held, empty = _held_rows(plan, store, apps)
    allowed = dict(zip(held, shared.count_allowed(list(held.values()), config).tolist(), strict=True))
    if not apps:
        shared.require_two_classes([held[name] for name in held if allowed[name]], config)
    test = _test_of(plan, task, test_store, test_rows)
    extracted_at = time.perf_counter()

    outcome = _run_on_engine(
        plan,
        held,
        store,
        shared,
        allowed,
        apps,
        partial(_coordinate, plan, parts, test, deliver, made),
    )
    if attack:
        outcome = replace(outcome, attack=_attack(attack, plan, shared, held))
    ended = time.perf_counter()
    decided = config.changed(outcome.settled)
    return RunResult(
        config=decided,
        model=outcome.model(plan.backbone.to(torch.device("cpu")), decided),
        outcome=outcome,
        test_score=test(outcome.head) if test else None,
        empty_sites=empty,
        skipped=store.skipped,
        withheld={name: len(rows) - allowed[name] for name, rows in held.items() if len(rows) > allowed[name]},
        extracted=store.extracted + (test_store.extracted if test_store else 0),
        examples=examples(decided, outcome, plan.backbone, plan.samples, store, held) if deliver else (),
        seconds={"extraction": extracted_at - started, "rounds": ended - extracted_at, "total": ended - started},
        run_dir=parts.path if parts else None,
    )


def _shared(plan: Plan, store: FeatureStore, task: Task, tuning: Tuning | None, adapters: Path | None) -> SharedData:
    """Return the data of all sites."""
    places, labels = ItemPlaces.with_targets(task, plan.backbone.geometry, plan.samples, plan.labels, store.features)
    return SharedData(
        plan.backbone,
        store,
        labels,
        plan.guard,
        task,
        plan.steps,
        labels_of(plan.samples),
        places,
        tuning=tuning,
        subgroups=Subgroups.of(plan.samples),
        adapters=adapters,
    )


def _attack(
    attack: Literal["membership", "audit"], plan: Plan, shared: SharedData, held: Mapping[str, IntArray]
) -> dict[str, Any]:
    """Return the results of an attack on the run's head, or of an audit of its noise."""
    from fedhead.simulations.attack import attack_membership
    from fedhead.simulations.audit import audit_private

    everyone = np.unique(np.concatenate(list(held.values())))
    made = audit_private if attack == "audit" else attack_membership
    return made(plan.config, plan.backbone, shared, everyone).to_dict()


def _run_on_engine(
    plan: Plan,
    held: Mapping[str, IntArray],
    store: FeatureStore,
    shared: SharedData,
    allowed: Mapping[str, int],
    apps: Mapping[str, ClientApp] | None,
    coordinate: Callable[[Grid], Outcome],
) -> Outcome:
    """Run a coordinator over sites in this process, on Ray, or in Flower's own engine."""
    config, table = plan.config, plan.config.simulation
    if table.engine == "flower":
        return run_on_flower(config, held, shared, store, coordinate)
    sites = [SimulatedSite(name, rows, shared, allowed[name]) for name, rows in held.items()]
    blocks = count_blocks(table.blocks, len(store.keys), len(sites))
    with in_process_identity(run_id=RUN_ID):
        if table.engine == "process":
            return coordinate(InProcessGrid(sites, apps, RUN_ID, blocks))
        told = Shared(
            path=str(store.path.resolve()),
            digest=store.digest,
            labels=shared.labels,
            own_labels=shared.own_labels,
            guard=shared.guard,
            task=config.task,
            classes=config.classes,
            device=table.device,
            run_id=RUN_ID,
            subgroups=shared.subgroups,
        )
        return run_on_ray(config, sites, held, store, told, blocks, coordinate)


def _require_plain_process(config: RunConfig) -> None:
    """Check that apps of sites' own can take part in a run.

    Raises:
        UserError: if not.
    """
    if config.simulation.engine != "process":
        raise UserError("Apps of sites' own run in this process: leave simulation.engine at 'process'.")
    if config.privacy.secure_sum:
        raise UserError("Apps of sites' own send plain replies: leave secure_sum off, or leave the apps out.")


def _coordinate(
    plan: Plan,
    parts: RunParts | None,
    test: Callable[[Head], float | None] | None,
    deliver: bool,
    made: Cut | None,
    grid: Grid,
) -> Outcome:
    coordinator = coordinator_for(plan.config)(
        plan.config,
        grid,
        plan.backbone,
        plan.config.classes,
        plan.strategy,
        observer=parts.observer if parts else None,
        sums=parts.sums if parts else None,
        test=test,
        checkpoint=parts.checkpoint if parts else None,
        deliver=deliver,
        made=made,
    )
    return coordinator.run()


def _held_rows(
    plan: Plan, store: FeatureStore, apps: Mapping[str, ClientApp] | None
) -> tuple[dict[str, IntArray], tuple[str, ...]]:
    """Return the rows of each site that has any, and the names of the others."""
    assigned = plan.assign(store.readable())
    held = {name: rows for name, rows in assigned.items() if len(rows)}
    empty = tuple(name for name in assigned if name not in held)
    if empty:
        said = "has no rows and takes" if len(empty) == 1 else "have no rows and take"
        logger.warning("%s %s no part: %s.", counted(len(empty), "site"), said, listed(empty, 5))
    if apps:
        logger.warning("%d sites run apps of their own, one at a time: %s.", len(apps), ", ".join(sorted(apps)[:5]))
    return held, empty


def run_baseline(plan: Plan, backbone: str) -> dict[str, Any]:
    """Return how the head of one exchange does on another backbone, over the same sites and held-out rows.

    Raises:
        UserError: if there is no such backbone.
        FedheadError: if the run fails.
    """
    init = make_task(plan.config.task, plan.config.classes).baseline_solver
    changes = {"backbone": backbone, "weights": "default", "layer": "penultimate", "head": "linear", "init": init}
    alone = {"rounds": 0, "tune": TuneConfig(), "diagnose": False, "strategy": {"name": "FedAvg"}}
    config = plan.config.changed({**changes, **alone})
    other = load_backbone(identity_for(backbone, plan.samples), seed=config.seed).to(plan.backbone.device)
    compared = replace(plan, config=config, strategy=build_strategy(config.strategy), backbone=other)
    result = run_plan(compared, deliver=False)
    return {
        "backbone": backbone,
        "score": result.evaluation.score.to_list(),
        "score_test": result.test_score,
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

    with ExitStack() as stack:
        extract: Extract = extract_blocks
        if table.engine == "ray" and table.cluster:
            stack.enter_context(connected(table.cluster))
            extract = extract_on_ray
        for samples in wanted:
            store = FeatureStore.open(
                plan.backbone,
                samples,
                strict=table.strict_data,
                precision=table.precision,
                progress=progress,
                extract=extract,
            )
            stores.append(store)
            before += len(samples)
    on_extraction(total, total)
    return stores[0], stores[1] if len(stores) == 2 else None


def _data_digest(plan: Plan, *stores: FeatureStore | None) -> str:
    """Return the SHA-256 of everything about the data that decides the result: features, keys, targets, owners."""
    digest = hashlib.sha256()
    for store, targets in zip(stores, (plan.labels, plan.test_labels), strict=True):
        if store is not None and targets is not None:
            digest.update(f"{store.digest} {targets.dtype} {targets.shape} ".encode() + targets.tobytes())
    digest.update(repr(plan.samples.sites).encode(errors="surrogatepass"))
    if plan.samples.subgroups is not None:
        digest.update(repr(plan.samples.subgroups).encode(errors="surrogatepass"))
    for name, rows in (plan.own_rows or {}).items():
        digest.update(f"{name} ".encode() + rows.tobytes())
    return digest.hexdigest()


def _test_of(
    plan: Plan, task: Task, store: FeatureStore | None, activations: Activations | None
) -> Callable[[Head], float | None] | None:
    """Return a function that scores a head on the pooled test set; None without one."""
    if store is None or plan.test_samples is None or plan.test_labels is None:
        return None
    places = ItemPlaces.of(task, plan.backbone.geometry, plan.test_samples)
    if places is not None:
        return _score_places(store, places)
    return _score_on(store, activations, torch.from_numpy(plan.test_labels), task)


def _score_places(store: FeatureStore, places: ItemPlaces) -> Callable[[Head], float | None]:
    return lambda head: places.task.score_of(places.evaluate(head, store.features, store.readable()))


def _tuning(
    plan: Plan, store: FeatureStore, test_store: FeatureStore | None, made: Cut | None
) -> tuple[Tuning | None, Activations | None]:
    """Open the activations of the sites' rows and of the test set in a tuned run, given its cut backbone."""
    if made is None:
        return None, None
    trunk, tail = made.split
    tail.to(plan.backbone.device)
    how = plan.config.simulation.activations
    tuning = Tuning.open(made, plan.samples, store.readable(), how)
    test = None
    if test_store is not None and plan.test_samples is not None:
        test = open_activations(trunk, tail, plan.test_samples, test_store.readable(), how)
    return tuning, test


def _score_on(
    store: FeatureStore, activations: Activations | None, targets: Tensor, task: Task
) -> Callable[[Head], float | None]:
    rows = torch.from_numpy(store.readable())

    @torch.inference_mode()
    def score(head: Head) -> float | None:
        if isinstance(head, TunedHead):
            assert activations is not None
            parts = torch.split(rows, head.most_rows)
            outputs = torch.cat([head(activations.take(part.numpy())).cpu() for part in parts])
        else:
            outputs = torch.cat([head(store.features[part]) for part in torch.split(rows, 8192)])
        return task.score_on(outputs, targets[rows])

    return score
