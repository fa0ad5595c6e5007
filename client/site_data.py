"""What a site holds: its rows as features under a run's backbone, and which of them are held out."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.weights import PartialWeights, weights_path
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.isolation import Isolation, isolation
from fedhead.client.release.atoms import Atoms, Population
from fedhead.client.release.guard import Guard, GuardedRows, count_rows
from fedhead.client.release.ledger import Ledger, ledger_path
from fedhead.client.release.masking import Asked, SecureSum
from fedhead.client.release.noise import Noise
from fedhead.client.release.row_sets import HELD_OUT_ROWS, TRAINING_ROWS, keys_of
from fedhead.client.release.secure_sessions import SecureSessions
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.client.training import LabelledFeatures, SiteRows
from fedhead.data import BoolArray, IntArray, KeyArray, held_out, load_samples, require_kind
from fedhead.devices import Precision, pick_device
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.heads import FeatureMap, Head, LinearHead, delivered_spec, unmapped
from fedhead.model import TransferModel, site_model_path
from fedhead.protocol.messages import Manifest, WeightsChunk
from fedhead.protocol.steps import Masking, Step
from fedhead.sums.calibration import Calibration
from fedhead.tasks import Targets, Task, make_task

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_BETWEEN_PROGRESS = 30.0
WARM = 3
"""How many backbones, and how many runs' features, a site keeps at hand."""
_WHAT_A_HOLDING_DEPENDS_ON = {"backbone_digest", "classes", "task", "privacy"}

PROBE_TOLERANCE = 1e-3
"""Relative to the probe's norm; devices differ by less, other preprocessing or weights by more."""


@dataclass(frozen=True)
class Holding:
    """A site's rows after its guard, ready for training.

    Attributes:
        data: features and labels, perhaps of more rows than the site's.
        train: the rows to train on and to sum.
        held_out: the rows to evaluate on.
        summable: those of `held_out` that may be summed.
        guarded: what the guard left and withheld.
        keys: of all rows of `data`, by which they are held out.
        contents: of all rows of `data`, by which the ledger knows them.
        task: names the groups that sums tell apart.
        share: of the rows that are held out.
        min_class_count: the guard's least number of rows behind a sum.
    """

    data: LabelledFeatures
    train: SiteRows
    held_out: SiteRows
    summable: SiteRows
    guarded: GuardedRows
    keys: KeyArray
    contents: KeyArray
    task: Task
    share: float | None = None
    min_class_count: int = 0

    @cached_property
    def keys_by_group(self) -> Mapping[str, KeyArray]:
        """The keys of the rows that releases rest on, by part and group."""
        targets = self.data.labels.cpu().numpy()
        parts = ((TRAINING_ROWS, self.train.rows), (HELD_OUT_ROWS, self.held_out.rows))
        return {
            name: keys
            for what, rows in parts
            for name, keys in keys_of(what, rows, self.contents, targets, self.task).items()
        }


def hold(
    name: str,
    rows: IntArray,
    out: BoolArray,
    data: LabelledFeatures,
    targets: Targets,
    keys: KeyArray,
    task: Task,
    guard: Guard,
    share: float | None = None,
    contents: KeyArray | None = None,
) -> Holding:
    """Let the guard withhold the rows that must not be computed on.

    Args:
        name: of the site.
        rows: `[n]`, its rows of `data`.
        out: `[n]`, which of them are held out.
        data: features and labels.
        targets: `[N, ...]`, the same targets in memory.
        keys: `[N]`, what rows are held out by.
        task: names the groups that the guard counts.
        guard: the site's own.
        share: of rows that are held out.
        contents: `[N]`, what the ledger knows rows by; by default `keys`.
    """
    guarded = guard.allowed_rows(rows, targets[rows], out, task)
    return Holding(
        data=data,
        train=SiteRows(name, guarded.train),
        held_out=SiteRows(name, guarded.held_out),
        summable=SiteRows(name, guard.summable(guarded.held_out, targets[guarded.held_out], task)),
        guarded=guarded,
        keys=keys,
        contents=keys if contents is None else contents,
        task=task,
        share=share,
        min_class_count=guard.min_class_count,
    )


class OpenSite(Protocol):
    """A site whose rows can be computed on."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def steps(self) -> Sequence[Step]:
        """What everything that leaves the site passes, in this order."""

    def open(self, manifest: Manifest) -> Holding:
        """Return what the guard leaves of the site's rows, after extracting features if that was not done yet.

        Raises:
            FedheadError: if the data cannot be read.
        """


class Site(OpenSite, Protocol):
    """One site, as the `ClientApp` sees it; it decides its own data, device and limits."""

    num_rows: int

    @property
    def training(self) -> TrainingLimits:
        """The site's bounds on how heads are trained."""

    def has_weights(self, manifest: Manifest) -> bool:
        """Tell whether the backbone's weights are here."""

    def install(self, manifest: Manifest, chunk: WeightsChunk) -> int | None:
        """Take in a part of the backbone's weights; verify and keep them once they are complete.

        Returns:
            How many bytes are here, in order, if some are missing; None if not.

        Raises:
            FedheadError: if they are not what the manifest says.
        """

    def check_data(self, manifest: Manifest) -> None:
        """Check that the site's data is what the run takes: images or texts, of its classes, and enough of them.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on; nothing was sent to it by then.
        """

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        """Check that the backbone gives the same features of the probe here.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on.
        """

    def keep_head(self, manifest: Manifest, head: Head, temperature: float, about: str) -> None:
        """Keep the site's personal head, for features as they are, as a model on this machine.

        Raises:
            FedheadError: if it cannot be written.
        """

    @property
    def sessions(self) -> SecureSessions:
        """The site's secure sums.

        Raises:
            FedheadError: if it takes no part in any.
        """

    def masking(self, asked: Asked) -> Masking:
        """Return how the site masks its sums for the session of a request.

        Raises:
            FedheadError: if it does not take part in the session.
        """

    def check_map(self, manifest: Manifest, mapping: FeatureMap | None) -> None:
        """Check that the site's own rules allow sums of its features under a map.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on.
        """


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

    def refresh(self) -> None:
        """Look at the data again: rows may have come or gone since.

        Raises:
            UserError: if the data is no longer there.
        """
        samples = load_samples(self.data)
        if samples.fingerprint != self.samples.fingerprint:
            logger.info("The data has changed: it is %d rows now, and was %d.", len(samples), self.num_rows)
            self._holdings.clear()
        self.samples, self.num_rows = samples, len(samples)

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
        require_kind(manifest.backbone, manifest.kind, self.samples.kind)
        self.training.check(manifest.local)
        self.noise.check(manifest)
        task = make_task(manifest.task, manifest.classes)
        targets = self._targets(task)
        every = np.arange(len(targets))
        if manifest.privacy is None:
            refuse_if_withheld(self.guard.allowed_rows(every, targets, np.zeros(len(every), np.bool_), task))
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

    def check_map(self, manifest: Manifest, mapping: FeatureMap | None) -> None:
        if mapping is None or not mapping.form.lift:
            return
        holding = self.open(manifest)
        self.guard.require_rows_for(mapping.width, mapping.plain, holding.guarded.num_rows)
        data = replace(holding.data, mapping=mapping)
        found = isolation(data.exact, mapping.width, np.concatenate([holding.train.rows, holding.held_out.rows]))
        self.backbones.require_features(f"{manifest.backbone}, lifted by {mapping.form},", found)

    def keep_head(self, manifest: Manifest, head: Head, temperature: float, about: str) -> None:
        if not self.keeps_heads:
            return
        path = site_model_path(self.name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        model = TransferModel(
            self._backbone(manifest),
            head,
            manifest.classes,
            delivered_spec(head, "linear" if isinstance(unmapped(head), LinearHead) else manifest.head),
            task=manifest.task,
            calibration=Calibration(temperature),
        )
        model.save(path)
        logger.info("This site's personal head (%s) is in %s.", about, path)

    def open(self, manifest: Manifest) -> Holding:
        key = manifest.model_dump_json(include=_WHAT_A_HOLDING_DEPENDS_ON)
        holding = self._holdings.get(key) or self._hold(manifest)
        _keep(self._holdings, key, holding)
        return holding

    @property
    def told_extraction(self) -> tuple[int, int] | None:
        """The extraction as the coordinator is told of it: nothing in runs that hide each site's number of rows."""
        return None if self.hides_rows else self.extraction

    def _hold(self, manifest: Manifest) -> Holding:
        self.hides_rows = manifest.secure_sum or manifest.privacy is not None
        store = self._store(self._backbone(manifest))
        if manifest.privacy is not None:
            return self._hold_all(manifest, store)
        found = self._isolations.get(store.digest) or _isolation_of(store)
        _keep(self._isolations, store.digest, found)
        self.backbones.require_features(manifest.backbone, found)
        task = make_task(manifest.task, manifest.classes)
        labels = self._targets(task)
        data = LabelledFeatures(
            store.features.to(self.device), torch.from_numpy(labels).to(self.device), loss=task.loss
        )
        rows = store.readable()
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
        waiting = np.setdiff1d(rows, np.concatenate([holding.guarded.train, holding.guarded.held_out]))
        if len(waiting):
            logger.warning(
                "The guard withholds %d rows until more come, %d or more of a class at a time: %s.",
                len(waiting),
                self.guard.min_class_count,
                count_rows(labels[waiting], task),
            )
        return holding

    def _hold_all(self, manifest: Manifest, store: FeatureStore) -> Holding:
        """Hold all rows that can be read for a private run: whether a rule removes rows would tell of single ones."""
        task = make_task(manifest.task, manifest.classes)
        labels = self._targets(task)
        data = LabelledFeatures(
            store.features.to(self.device), torch.from_numpy(labels).to(self.device), loss=task.loss
        )
        rows = store.readable()
        out = held_out(store.keys[rows], self.holdout)
        return hold(self.name, rows, out, data, labels, store.keys, task, Guard.off(), share=self.holdout)

    def _store(self, backbone: Backbone) -> FeatureStore:
        last_said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal last_said
            self.extraction = (done, total)
            if time.monotonic() - last_said > SECONDS_BETWEEN_PROGRESS:
                last_said = time.monotonic()
                logger.info("Features of %d of %d rows are done.", done, total)

        try:
            return FeatureStore.open(
                backbone, self.samples, strict=self.strict_data, precision=self.precision, progress=say
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


def _isolation_of(store: FeatureStore) -> Isolation:
    return isolation(lambda rows: store.features[rows].cpu(), store.features.shape[1], store.readable())


def _keep(warm: dict[str, T], key: str, value: T) -> None:
    """Make `value` the latest of at most `WARM`."""
    warm.pop(key, None)
    warm[key] = value
    while len(warm) > WARM:
        del warm[next(iter(warm))]


def refuse_if_withheld(guarded: GuardedRows) -> None:
    """Raise what the guard says of a site that it withholds as a whole.

    Raises:
        FedheadError: if it does.
    """
    if guarded.refusal:
        raise FedheadError(guarded.refusal)


def require_same(backbone: Backbone, manifest: Manifest) -> None:
    """Check that a site's backbone is the one that a manifest names, so that its own rules and records are about it.

    Raises:
        FedheadError: if spec, layer, weights or digest differ.
    """
    if backbone.digest != manifest.backbone_digest:
        raise FedheadError(
            f"{manifest.backbone} is fed or built differently here than at the coordinator (backbone digest "
            f"{backbone.digest[:12]}…, not {manifest.backbone_digest[:12]}…); install the coordinator's versions of "
            "fedhead and torchvision."
        )
    named = (manifest.backbone, manifest.layer, manifest.weights_digest)
    if (backbone.spec, backbone.layer, backbone.weights_digest) != named:
        raise FedheadError("The run gives its backbone the spec, layer or weights of another one.")


def check_backbone(backbone: Backbone, own_probe: Tensor, manifest: Manifest, probe: Tensor) -> None:
    """Check that a site's backbone is the coordinator's, to the features of the probe: no digest covers code.

    Args:
        backbone: this site's.
        own_probe: its features `[PROBES, d]` of the probe.
        manifest: the coordinator's.
        probe: the coordinator's features `[PROBES, d]`.

    Raises:
        FedheadError: if they differ.
    """
    require_same(backbone, manifest)
    for where, features in (("here", own_probe), ("at the coordinator", probe)):
        if not bool(features.isfinite().all()):
            raise FedheadError(
                f"{manifest.backbone} gives features that are not finite (NaN or infinity) {where}: its weights or the "
                "precision of the device are at fault. Take other weights, or --precision float32."
            )
    same_shape = own_probe.shape == probe.shape
    distance = float((own_probe - probe).norm() / probe.norm().clamp_min(1e-12)) if same_shape else float("inf")
    if not distance <= PROBE_TOLERANCE:
        raise FedheadError(
            f"{manifest.backbone} gives other features here than at the coordinator: they differ by {distance:.1g} of "
            f"their norm on the probe, where {PROBE_TOLERANCE:g} is allowed. Install the coordinator's versions of "
            "torch and torchvision, or use another --device."
        )
