"""The plan of a simulation: everything that can be checked before anything is run."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.identity import identity_for
from fedhead.client.release.guard import Guard
from fedhead.client.release.masking import SecureSum
from fedhead.client.release.noise import Noise
from fedhead.config import SUBGROUPED, RunConfig
from fedhead.data import IntArray, Samples, load_samples, load_sites, require_kind
from fedhead.devices import pick_device
from fedhead.errors import UserError
from fedhead.heads import make_head
from fedhead.heads.feature_map import parse_lift
from fedhead.protocol.steps import Step
from fedhead.server.privacy import private_settings, require_enough_sites
from fedhead.server.starting_head import UNSOLVED, resolve_init
from fedhead.server.strategies import build_strategy
from fedhead.simulations.cluster import require_ray
from fedhead.simulations.partition import check_rows, divide
from fedhead.sums.projection import MAX_WIDTH
from fedhead.tasks import Targets, Task, make_task, tasks
from fedhead.tasks.dense import require_rows

logger = logging.getLogger(__name__)

SUMS_BYTES = 2 * 2**30
"""Each site's own sums are kept by default up to this size."""


@dataclass(frozen=True)
class Inputs:
    """Objects in memory that replace parts of a run's configuration.

    Attributes:
        data: overrides `simulation.data`.
        sites: overrides `simulation.sites`; may be each site's own row numbers, instead of a partition.
        test_data: overrides `simulation.test_data`; a pooled test set beside the sites' held-out rows.
        shared_rows: whether several sites may hold the same row, where `sites` are row numbers.
        strategy: overrides `strategy`.
    """

    data: str | Samples | None = None
    sites: int | Sequence[npt.ArrayLike] | None = None
    test_data: str | Samples | None = None
    shared_rows: bool = False
    strategy: Strategy | None = None

    def over(self, config: RunConfig) -> RunConfig:
        """Return a configuration with the names of the given objects in it."""
        changes = {
            "data": self.data.spec if isinstance(self.data, Samples) else self.data,
            "test_data": self.test_data.spec if isinstance(self.test_data, Samples) else self.test_data,
            "sites": self.sites if self.sites is None or isinstance(self.sites, int) else len(self.sites),
        }
        return config.changed({"simulation": {key: value for key, value in changes.items() if value is not None}})

    def load(self, config: RunConfig) -> tuple[Samples, Samples | None]:
        """Return the sites' data and the test set of a configuration that `over` returned."""
        table = config.simulation
        load_data = load_sites if table.partition.partition(":")[0] == "folder" else load_samples
        samples = self.data if isinstance(self.data, Samples) else load_data(table.data)
        if isinstance(self.test_data, Samples):
            return samples, self.test_data
        return samples, load_samples(table.test_data) if table.test_data else None

    def own_rows(self, rows: int) -> dict[str, IntArray] | None:
        """Return each site's row numbers, checked against the number of all rows; None for a partition.

        Raises:
            UserError: if they are out of range, or sites share rows that may not be shared.
        """
        if self.sites is None or isinstance(self.sites, int):
            return None
        return check_rows(self.sites, rows, self.shared_rows)


@dataclass(frozen=True)
class Plan:
    """A checked simulation, before anything is run.

    Attributes:
        config: the run, including everything that its data decides.
        strategy: Flower's, or the user's own.
        backbone: on the device of the run.
        samples: all sites' rows.
        labels: their targets.
        test_samples: the pooled test set, if there is one.
        test_labels: its targets.
        own_rows: each site's row numbers, if they were given instead of a partition.
    """

    config: RunConfig
    strategy: Strategy
    backbone: Backbone
    samples: Samples
    labels: Targets
    test_samples: Samples | None
    test_labels: Targets | None
    own_rows: Mapping[str, IntArray] | None

    @property
    def name(self) -> str:
        """The end of a run folder's name: backbone and data, without the folders and settings in their specs."""
        source, _, name = self.backbone.spec.partition(":")
        name = Path(name.partition("?")[0]).name
        return "-".join((source, re.sub(r"[^\w.-]+", "-", name)[:60], self.samples.spec.partition(":")[0]))

    @property
    def guard(self) -> Guard:
        """Every site's guard."""
        if self.config.privacy.on:
            # Whether a rule removes rows would tell of single ones.
            return Guard.off()
        return Guard(self.config.simulation.min_class_count, self.config.simulation.min_rows)

    @property
    def steps(self) -> Sequence[Step]:
        """The release steps of every site after its guard."""
        return [SecureSum()] if self.config.privacy.secure_sum else []

    @property
    def release_steps(self) -> Sequence[str]:
        """A sentence for each step that all sites' replies pass."""
        noise = [Noise()] if self.config.privacy.on else []
        return [said for step in (self.guard, *noise, *self.steps) if (said := step.describe())]

    def assign(self, readable: IntArray) -> dict[str, IntArray]:
        """Return each site's rows of those that are readable."""
        if self.own_rows is not None:
            if len(readable) == len(self.samples):
                return {name: np.sort(rows) for name, rows in self.own_rows.items()}
            return {name: np.intersect1d(rows, readable) for name, rows in self.own_rows.items()}
        table = self.config.simulation
        owners = None if self.samples.sites is None else [self.samples.sites[row] for row in readable]
        strata = make_task(self.config.task, self.config.classes).strata(self.labels[readable])
        if self.samples.sequences is None:
            parts = divide(table.partition, strata, table.sites, self.config.seed, owners)
            return {name: readable[part] for name, part in parts.items()}
        # A sequence is at one site, by its last stratum: that of an entity rather than of no entity.
        _, first, inverse = np.unique(self.samples.sequences[readable, 0], return_index=True, return_inverse=True)
        whole = np.zeros(len(first), np.int64)
        np.maximum.at(whole, inverse, strata)
        own = None if owners is None else [owners[row] for row in first]
        parts = divide(table.partition, whole, table.sites, self.config.seed, own)
        order = inverse.argsort(kind="stable")
        of_sequence = np.split(order, np.searchsorted(inverse[order], np.arange(1, len(first))))
        return {
            name: readable[np.sort(np.concatenate([order[:0], *(of_sequence[one] for one in np.unique(part))]))]
            for name, part in parts.items()
        }


def make_plan(config: RunConfig, inputs: Inputs = Inputs()) -> Plan:
    """Load and check everything that a simulation needs.

    Raises:
        UserError: if something asked for does not exist or does not fit.
    """
    given = inputs.over(config).settled()
    if given.simulation.engine != "process":
        require_ray(given.simulation.engine, given.simulation.cluster)
    strategy = inputs.strategy or build_strategy(given.strategy)
    given = private_settings(given, strategy)
    _require_masks(given, strategy)
    device = pick_device(given.simulation.device)
    samples, test_samples = inputs.load(given)
    loaded = [one for one in (samples, test_samples) if one is not None]
    for one in loaded:
        tasks[given.task].require(one)
    named = load_samples(given.classes_from) if given.classes_from and not given.classes else samples
    task = make_task(given.task, given.classes or tasks[given.task].columns_of(named))
    own = samples.spec.startswith("features:") and "backbone" not in given.model_fields_set
    spec = identity_for("features" if own else given.backbone, samples)
    backbone = load_backbone(spec, weights=given.weights, layer=given.layer, seed=given.seed).to(device)
    for one in loaded:
        require_kind(backbone.spec, backbone.kind, one.kind)
    require_rows(tasks[given.task], backbone.geometry)
    if not backbone.trained:
        logger.warning("The weights of %s are random, as asked for: nothing is transferred.", backbone.spec)
    init = resolve_init(given, make_head(given.head, backbone.num_features, len(task.columns)), task)
    labels = task.encode(samples)
    given = _sums_that_fit(given.changed({"init": init}), backbone.num_features)
    settled = {
        "backbone": backbone.spec,
        "init": init,
        "classes": list(task.columns),
        "classes_from": "",
        "subgroups": list(given.subgroups or _subgroups_of(samples, given)),
        "weights": _absolute(given.weights),
        "simulation": {"data": samples.spec, "test_data": test_samples.spec if test_samples else ""},
    }
    plan = Plan(
        config=given.changed(settled),
        strategy=strategy,
        backbone=backbone,
        samples=samples,
        labels=labels,
        test_samples=test_samples,
        test_labels=_test_targets(test_samples, labels, task) if test_samples else None,
        own_rows=inputs.own_rows(len(samples)),
    )
    plan.assign(np.arange(len(samples)))
    return plan


def _subgroups_of(samples: Samples, config: RunConfig) -> list[str]:
    """Return the subgroups that the data names; none, with a warning, where a run of this kind counts none."""
    names = sorted({name for name in samples.subgroups or () if name is not None})
    if names and (config.privacy.on or config.task not in SUBGROUPED):
        logger.warning(
            "The head is not evaluated by subgroup: that is for the tasks %s without differential privacy.",
            " and ".join(SUBGROUPED),
        )
        return []
    return names


def _require_masks(config: RunConfig, strategy: Strategy) -> None:
    """Check that secure summation and differential privacy can be simulated, if they are on.

    Raises:
        UserError: if there are too few sites, or another engine sums their replies.
    """
    require_enough_sites(config, config.simulation.sites, strategy)
    if config.privacy.on and config.simulation.engine != "process":
        raise UserError("Private runs are simulated in this process: leave simulation.engine at 'process'.")
    if config.privacy.secure_sum and config.simulation.engine != "process":
        raise UserError("Secure summation is simulated in this process: leave simulation.engine at 'process'.")


def _test_targets(test: Samples, targets: Targets, task: Task) -> Targets:
    """Return the test set's targets; warn if it has rows of a class that no site has any of."""
    try:
        tested = task.encode(test)
    except UserError as error:
        raise UserError(
            f"In the test data, {error} No site has rows of that class: correct or remove the test rows."
        ) from None
    unseen = (task.count_rows(tested)[0] > 0) & (task.count_rows(targets)[0] == 0)
    if unseen.any():
        logger.warning(
            "The test data has rows of classes that no site has any of, and no head can know: %s.",
            ", ".join(sorted(task.counted[place] for place in np.flatnonzero(unseen))),
        )
    return tested


def _sums_that_fit(config: RunConfig, num_features: int) -> RunConfig:
    """Return the run with sums pooled at once where nobody asked for each site's, and they would fill the disk."""
    _, lifted = parse_lift("none" if config.lift == "auto" else config.lift)
    width = lifted or min(num_features, MAX_WIDTH)
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
