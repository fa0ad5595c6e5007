"""A site whose data is on this machine."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.geometry import Geometry
from fedhead.backbones.identity import marks_of
from fedhead.backbones.objectives import Cut, cut
from fedhead.backbones.split import merged
from fedhead.backbones.weights import PartialWeights, weights_path
from fedhead.client.backbones import AcceptedBackbones, check_backbone, require_same
from fedhead.client.isolation import Features, Isolation, commonly_marked, isolation
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.own_adapters import OwnAdapters
from fedhead.client.release.atoms import Atoms
from fedhead.client.release.guard import Guard, count_rows, labels_of, named_people, people_of
from fedhead.client.release.ledger import Ledger, ledger_path
from fedhead.client.release.masking import Asked, SecureSum
from fedhead.client.release.noise import Noise
from fedhead.client.release.population import Population
from fedhead.client.release.secure_sessions import SecureSessions
from fedhead.client.release.subgroups import Subgroups
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.client.site_data import Holding, hold, refuse_if_withheld
from fedhead.client.tails import Tuning
from fedhead.data import IntArray, held_out, load_samples, require_kind
from fedhead.devices import Precision, pick_device
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.files import home, safe_name
from fedhead.heads import FeatureMap, Head, LinearHead, delivered_spec, unmapped
from fedhead.model import BACKBONE_FILE, TransferModel, forget_other_kind, new_site_model
from fedhead.protocol.messages import Manifest, WeightsChunk
from fedhead.protocol.steps import Masking, Step
from fedhead.sums.calibration import Calibration
from fedhead.tasks import Targets, Task, make_task
from fedhead.tasks.dense import ItemPlaces
from fedhead.tuning import NEXT_TOKEN, ActivationsFrom, parse_tune
from fedhead.wording import quoted

logger = logging.getLogger(__name__)


T = TypeVar("T")

SECONDS_BETWEEN_PROGRESS = 30.0

WARM = 3
"""How many backbones, and how many runs' features, a site keeps at hand."""

_WHAT_A_HOLDING_DEPENDS_ON = {"backbone_digest", "classes", "task", "privacy"}


class LocalSite:
    """A site whose data is on this machine.

    Attributes:
        extraction: the rows whose features are extracted and those to extract; None between extractions.
        hides_rows: whether the run that features are extracted for hides how many rows each site has.
        keeps_heads: whether personal heads are written to this machine.
    """

    def __init__(
        self,
        name: str,
        data: str,
        device: str = "auto",
        strict_data: bool = False,
        guard: Guard | None = None,
        ledger: Ledger | None = None,
        before: Sequence[Step] = (),
        precision: Precision = "float32",
        activations: ActivationsFrom = "auto",
        backbones: AcceptedBackbones | None = None,
        holdout: float = 0.2,
        training: TrainingLimits | None = None,
        receiver: str = "",
        summation: SecureSum | None = None,
        noise: Noise | None = None,
    ) -> None:
        self.name = name
        self.noise = noise or Noise(own=True)
        self._receiver = receiver or name
        self.holdout = holdout
        self.backbones = backbones or AcceptedBackbones()
        self.device = pick_device(device)
        self.strict_data = strict_data
        self.precision = precision
        self.activations = activations
        self.guard = guard or Guard()
        self.training = training or TrainingLimits(self.guard.min_class_count)
        ledger = ledger or Ledger(ledger_path(name), self.guard.min_class_count)
        self.atoms = Atoms(ledger.atoms)
        self.summation = summation or SecureSum()
        self.steps: Sequence[Step] = (self.guard, self.noise, *before, ledger, self.summation)
        self.data = data
        self.samples = load_samples(data)
        self.num_rows = len(self.samples)
        self.extraction: tuple[int, int] | None = None
        self.hides_rows = False
        self._backbones: dict[str, Backbone] = {}
        self.keeps_heads = True
        self._holdings: dict[str, Holding] = {}
        self._isolations: dict[str, Isolation] = {}
        self._splits: dict[str, Cut] = {}
        self._tunings: dict[str, Tuning] = {}

    def refresh(self) -> None:
        """Look at the data again: rows may have come or gone since.

        Raises:
            UserError: if the data is no longer there.
        """
        samples = load_samples(self.data)
        if samples.fingerprint != self.samples.fingerprint:
            logger.info("The data has changed: it is %d rows now, and was %d.", len(samples), self.num_rows)
            self._holdings.clear()
            self._tunings.clear()
        self.samples, self.num_rows = samples, len(samples)

    def tuning(self, manifest: Manifest) -> Tuning:
        key = _tuning_key(manifest)
        found = self._tunings.get(key) or self._cut(manifest)
        _keep(self._tunings, key, found)
        return found

    def _cut(self, manifest: Manifest) -> Tuning:
        made = self._split(manifest)
        readable = self._store(self._backbone(manifest), manifest).readable()
        return Tuning.open(made, self.samples, readable, self.activations)

    def _split(self, manifest: Manifest) -> Cut:
        """Return the two parts of a tuned run's backbone, and the objective of the tail.

        Raises:
            FedheadError: if it cannot be cut, or more of it would train than this site allows.
        """
        key = _tuning_key(manifest)
        found = self._splits.get(key)
        if found is None:
            try:
                found = cut(self._backbone(manifest), parse_tune(manifest.tune), manifest.objective)
            except UserError as error:
                raise FedheadError(f"This site cannot tune {manifest.backbone}: {error}") from None
            self.training.check_tail(manifest.tune, found.num_parameters)
            found.split.tail.to(self.device)
        _keep(self._splits, key, found)
        return found

    def has_weights(self, manifest: Manifest) -> bool:
        return self._find_backbone(manifest) is not None

    def install(self, manifest: Manifest, chunk: WeightsChunk) -> int | None:
        self.backbones.require(manifest)
        if weights_path(manifest.weights_digest).is_file():
            return None
        self.backbones.require_size(manifest.backbone, chunk.size)
        partial = PartialWeights(manifest.weights_digest, chunk.file, chunk.size, self._receiver)
        return None if partial.add(chunk.offset, chunk.data.data) else partial.received

    def check_data(self, manifest: Manifest) -> None:
        self.summation.check(manifest)
        self.guard.check(manifest)
        require_kind(manifest.backbone, manifest.kind, self.samples.kind)
        self.training.check(manifest.local)
        self.noise.check(manifest)
        task = make_task(manifest.task, manifest.classes)
        if manifest.privacy is None and self.guard.min_class_count > 1:
            self.atoms.check_grid(task)
        targets = self._targets(task)
        every = np.arange(len(targets))
        if manifest.privacy is None:
            people = named_people(self.samples)
            refuse_if_withheld(self.guard.allowed_rows(every, targets, np.zeros(len(every), np.bool_), task, people))
        if manifest.holdout != self.holdout:
            logger.info(
                "The run asks to hold out a share of %g of the rows. The site decides: it holds out %g, the holdout of "
                "its site.toml.",
                manifest.holdout,
                self.holdout,
            )

    def masking(self, asked: Asked) -> Masking:
        return self.summation.masking(asked)

    @property
    def sessions(self) -> SecureSessions:
        return self.summation.sessions

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        backbone = self._backbone(manifest)
        check_backbone(backbone, backbone.probe(), manifest, probe)
        if manifest.tune:
            # A refusal later on would spoil a secure sum, and lose the round of a plain one.
            self._split(manifest)

    def check_map(self, manifest: Manifest, mapping: FeatureMap | None) -> None:
        if mapping is None or not mapping.form.lift:
            return
        holding = self.open(manifest)
        self.guard.require_rows_for(mapping.width, mapping.plain, holding.guarded.num_rows)
        data = replace(holding.data, mapping=mapping)
        found = isolation(data.exact, mapping.width, np.concatenate([holding.train.rows, holding.held_out.rows]))
        self.backbones.require_features(f"{manifest.backbone}, lifted by {mapping.form},", found)

    def check_tail(self, manifest: Manifest, features: Features) -> None:
        holding = self.open(manifest)
        rows = np.concatenate([holding.train.rows, holding.held_out.rows])
        found = isolation(features, manifest.num_features, rows)
        self.backbones.require_features(f"a tail of {manifest.backbone}", found, chosen=True)

    @property
    def own_adapters(self) -> OwnAdapters:
        return OwnAdapters(home() / "site-adapters" / safe_name(self.name))

    def keep_head(
        self,
        manifest: Manifest,
        head: Head,
        temperature: float,
        about: str,
        tail: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not self.keeps_heads:
            return
        backbone = self._backbone(manifest)
        path = new_site_model(self.name, tuned=tail is not None)
        if tail is not None:
            backbone = merged(backbone, self._split(manifest).split.tail, tail)
            backbone.save(path.with_name(BACKBONE_FILE))
        model = TransferModel(
            backbone,
            head,
            manifest.classes,
            delivered_spec(head, "linear" if isinstance(unmapped(head), LinearHead) else manifest.head),
            task=manifest.task,
            calibration=Calibration(temperature),
        )
        model.save(path)
        forget_other_kind(self.name, tuned=tail is not None)
        logger.info("This site's personal head (%s) is in %s.", about, path)

    def open(self, manifest: Manifest) -> Holding:
        key = manifest.model_dump_json(include=_WHAT_A_HOLDING_DEPENDS_ON)
        holding = self._holdings.get(key) or self._hold(manifest)
        _keep(self._holdings, key, holding)
        return holding

    @property
    def told_extraction(self) -> tuple[int, int] | None:
        """The extraction as the coordinator sees it: nothing in runs that hide each site's number of rows."""
        return None if self.hides_rows else self.extraction

    def _hold(self, manifest: Manifest) -> Holding:
        self.hides_rows = manifest.secure_sum or manifest.privacy is not None
        backbone = self._backbone(manifest)
        store = self._store(backbone, manifest)
        if manifest.privacy is not None:
            return self._hold_all(manifest, store)
        # No sums of a language model's losses leave as features, and one long conversation may dominate them.
        if manifest.layer != NEXT_TOKEN:
            found = self._isolations.get(store.digest) or _isolation_of(store, backbone.geometry)
            _keep(self._isolations, store.digest, found)
            self.backbones.require_features(manifest.backbone, found)
        task = make_task(manifest.task, manifest.classes)
        places, labels = ItemPlaces.with_targets(
            task, backbone.geometry, self.samples, self._targets(task), store.features
        )
        data = LabelledFeatures.of(store.features, labels, task, self.device, places)
        rows = self._commonly_marked(store, manifest.backbone)
        population = Population.of(self.samples, rows, store.keys, store.contents)
        admitted = self.atoms.admit(population, labels[rows], task, self.guard, self.holdout)
        chosen = rows[admitted.rows]
        holding = hold(
            self.name,
            chosen,
            admitted.held_out,
            data,
            labels,
            store.keys,
            task,
            self.guard,
            share=self.holdout,
            contents=store.contents,
            people=people_of(store.keys, store.contents),
            labels=labels_of(self.samples),
            subgroups=Subgroups.of(self.samples),
            by_subgroup=admitted.by_subgroup,
        )
        refuse_if_withheld(holding.guarded)
        if not holding.guarded.num_rows:
            if self.atoms.path.exists():
                logger.error(
                    "All rows that were released before have changed since. If only their labels have, and sums by the "
                    "old and the new labels may be compared, move %s away.",
                    self.atoms.path,
                )
            raise FedheadError(self.guard.refusal)
        _warn_of_uncounted(holding)
        waiting = np.setdiff1d(rows, np.concatenate([holding.guarded.train, holding.guarded.held_out]))
        if len(waiting):
            logger.warning(
                "The guard withholds %d rows until more come, %d or more of a class at a time: %s.",
                len(waiting),
                self.guard.min_class_count,
                count_rows(labels[waiting], task),
            )
        return holding

    def _commonly_marked(self, store: FeatureStore, spec: str) -> IntArray:
        """Return the readable rows but those that have, or lack, a level or a missing number as one of few."""
        rows, marks = store.readable(), marks_of(spec)
        if not marks:
            return rows
        marked = store.features[torch.from_numpy(rows)][:, list(marks)].cpu().numpy() != 0
        people = people_of(store.keys[rows], store.contents[rows])
        kept = commonly_marked(marked, self.guard.min_class_count, people)
        if not kept.all():
            have = np.minimum(marked.sum(axis=0), (~marked).sum(axis=0))
            rare = np.flatnonzero((have > 0) & (have < self.guard.min_class_count))
            logger.warning(
                "The guard withholds %d rows, since fewer than %d of all rows have or lack one of the features %s.",
                len(rows) - kept.sum(),
                self.guard.min_class_count,
                quoted([list(marks.values())[place] for place in rare.tolist()], 10),
            )
        return rows[kept]

    def _hold_all(self, manifest: Manifest, store: FeatureStore) -> Holding:
        """Hold all readable rows for a private run: a rule that removes rows would reveal single ones."""
        task = make_task(manifest.task, manifest.classes)
        labels = self._targets(task)
        data = LabelledFeatures.of(store.features, labels, task, self.device)
        rows = store.readable()
        out = held_out(store.keys[rows], self.holdout)
        return hold(self.name, rows, out, data, labels, store.keys, task, Guard.off(), share=self.holdout)

    def _store(self, backbone: Backbone, manifest: Manifest) -> FeatureStore:
        last_said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal last_said
            self.extraction = (done, total)
            if time.monotonic() - last_said > SECONDS_BETWEEN_PROGRESS:
                last_said = time.monotonic()
                logger.info("Features of %d of %d rows are done.", done, total)

        try:
            # A coordinator may choose a backbone that some rows do not fit, and a refusal would tell of them.
            return FeatureStore.open(
                backbone,
                self.samples,
                strict=self.strict_data and not self.hides_rows,
                empty=manifest.privacy is not None,
                precision=self.precision,
                progress=say,
            )
        except UserError:
            raise
        except FedheadError as error:
            # It may name a file, and a file's name may be a person's.
            logger.error("%s", error)
            raise FedheadError("Its data cannot be turned into features; the site's own log says why.") from None
        finally:
            self.extraction = None

    def _targets(self, task: Task) -> Targets:
        task.require(self.samples)
        try:
            return task.encode(self.samples)
        except UserError as error:
            # It names a file, and a file's name may be a person's.
            logger.error("%s", error)
            raise FedheadError(task.misfit) from None

    def _find_backbone(self, manifest: Manifest) -> Backbone | None:
        if manifest.backbone_digest not in self._backbones:
            found = self.backbones.find(manifest)
            if found is None:
                return None
            _keep(self._backbones, manifest.backbone_digest, found.to(self.device))
        backbone = self._backbones[manifest.backbone_digest]
        require_same(backbone, manifest)
        return backbone

    def _backbone(self, manifest: Manifest) -> Backbone:
        found = self._find_backbone(manifest)
        if found is None:
            raise FedheadError(f"The weights of {manifest.backbone} are not installed at {self.name}.")
        return found


def _tuning_key(manifest: Manifest) -> str:
    return f"{manifest.backbone_digest} {manifest.tune} {manifest.objective}"


def _warn_of_uncounted(holding: Holding) -> None:
    uncounted = len(holding.held_out.rows) - len(holding.by_subgroup)
    if holding.subgroups is None or not uncounted or holding.min_class_count < 2:
        return
    logger.warning(
        "%d of %d held-out rows are counted in no subgroup: they have none, were released together with rows of others "
        "before their column was named, or are fewer than %d of a subgroup and class.",
        uncounted,
        len(holding.held_out.rows),
        holding.min_class_count,
    )


def _isolation_of(store: FeatureStore, geometry: Geometry | None) -> Isolation:
    if geometry is None:
        return isolation(lambda rows: store.features[rows].cpu(), store.features.shape[1], store.readable())
    return isolation(lambda rows: _means(store, geometry, rows), geometry.num_features, store.readable())


def _means(store: FeatureStore, geometry: Geometry, rows: Tensor) -> Tensor:
    """Return each item's mean over its places, from a few items at a time."""
    return torch.cat([geometry.means(store.features[some].cpu()) for some in torch.split(rows, 8)])


def _keep(warm: dict[str, T], key: str, value: T) -> None:
    """Make `value` the latest of at most `WARM`."""
    warm.pop(key, None)
    warm[key] = value
    while len(warm) > WARM:
        del warm[next(iter(warm))]
