"""A site's sums for a run that it joins or leaves after its end, computed on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedhead.backbones import Backbone
from fedhead.client.agreement import Agreement
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.release.atoms import Atoms
from fedhead.client.release.guard import Guard, labels_of, people_of
from fedhead.client.release.ledger import Ledger, ledger_path
from fedhead.client.release.population import Population
from fedhead.client.release.required import refuse_plain_sums
from fedhead.client.release.step import release
from fedhead.client.site_data import Holding, hold
from fedhead.client.sum_handlers import sum_rows
from fedhead.data import Samples
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.heads import FeatureMap
from fedhead.protocol.actions import STATISTICS
from fedhead.protocol.messages import Manifest, StatisticsRequest
from fedhead.protocol.steps import Part, Step
from fedhead.sums.features import FeatureStatistics
from fedhead.tasks import Targets, Task, make_task
from fedhead.tasks.dense import ItemPlaces


@dataclass(frozen=True)
class OwnSums:
    """A site's rows under a run's backbone, and their sums.

    Attributes:
        parts: the sums that leave.
        holding: the rows that the guard allows.
        withheld: the number of rows that it withholds.
        skipped: the number of unreadable rows.
    """

    parts: Mapping[Part, FeatureStatistics]
    holding: Holding
    withheld: int
    skipped: int


@dataclass(frozen=True)
class _OneSite:
    """A site that is open already."""

    name: str
    holding: Holding
    steps: Sequence[Step]

    def open(self, manifest: Manifest) -> Holding:
        return self.holding


def require_rows(site: str, guard: Guard, targets: Targets, task: Task) -> None:
    """Check that a site's rules let its sums leave, before its features are extracted.

    Raises:
        UserError: if it requires protection that only runs have, or the guard withholds it as a whole.
    """
    refuse_plain_sums(site, ledger_path(site))
    every = np.arange(len(targets))
    _refuse(guard.allowed_rows(every, targets, np.zeros(len(every), np.bool_), task).refusal)


def sum_own_rows(
    site: str,
    samples: Samples,
    store: FeatureStore,
    targets: Targets,
    backbone: Backbone,
    manifest: Manifest,
    probe: torch.Tensor,
    guard: Guard,
    parts: Sequence[Part],
    mapping: FeatureMap | None = None,
    origin: torch.Tensor | None = None,
) -> OwnSums:
    """Sum a site's rows as it does in a run: its guard, atoms and ledger apply.

    Args:
        site: its name.
        samples: its data.
        store: the features of its rows.
        targets: of all rows.
        backbone: the run's, checked, on the device to compute on.
        manifest: of the run.
        probe: `[1, d]`, the mean of the coordinator's probe features.
        guard: the site's.
        parts: which rows to sum.
        mapping: of the features, under which the run's head was solved.
        origin: `[D]`, of the run's sums, if there is a map.

    Raises:
        UserError: if the guard withholds the site as a whole.
        FedheadError: if nothing may leave.
    """
    task = make_task(manifest.task, manifest.classes)
    rows = store.readable()
    places, targets = ItemPlaces.with_targets(task, backbone.geometry, samples, targets, store.features)
    data = LabelledFeatures.of(store.features, targets, task, backbone.device, places)
    ledger = Ledger(ledger_path(site), guard.min_class_count)
    admitted = Atoms(ledger.atoms).admit(
        Population.of(samples, rows, store.keys, store.contents), targets[rows], task, guard, manifest.holdout
    )
    holding = hold(
        site,
        rows[admitted.rows],
        admitted.held_out,
        data,
        targets,
        store.keys,
        task,
        guard,
        share=manifest.holdout,
        contents=store.contents,
        people=people_of(store.keys, store.contents),
        labels=labels_of(samples),
    )
    _require_rows_for(guard, holding, mapping)
    agreed = Agreement(manifest, probe, None, mapping=mapping, own_origin=origin)
    present = _OneSite(site, holding, (guard, ledger))
    sums = {part: _released(present, agreed, part) for part in parts}
    return OwnSums(sums, holding, len(rows) - holding.guarded.num_rows, len(store.skipped))


def _released(site: _OneSite, agreed: Agreement, part: Part) -> FeatureStatistics:
    """Return the sums of a part of a site's rows, after its release steps."""
    payload = sum_rows([site], agreed, StatisticsRequest(rows=part))
    form = "" if agreed.mapping is None else str(agreed.mapping.form)
    arrays = release(payload, site, STATISTICS, manifest=agreed.manifest, parts=(part,), features=form).arrays
    return FeatureStatistics.from_tensors({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def _require_rows_for(guard: Guard, holding: Holding, mapping: FeatureMap | None) -> None:
    """Check that the guard leaves rows, and enough of them for a map of features.

    Raises:
        UserError: if not.
    """
    _refuse(holding.guarded.refusal if holding.guarded.num_rows else guard.refusal)
    if mapping is not None:
        try:
            guard.require_rows_for(mapping.width, mapping.plain, holding.guarded.num_rows)
        except FedheadError as error:
            raise UserError(str(error)) from None


def _refuse(refusal: str) -> None:
    if refusal:
        raise UserError(refusal)
