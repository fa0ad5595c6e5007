"""What a site holds: its rows as features under a run's backbone, and which of them are held out."""

import logging
import time
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.weights import PartialWeights, find_backbone, weights_path
from fedhead.client.guard import Guard, GuardedRows, Ledger, ledger_path
from fedhead.client.training import LabelledFeatures, SiteRows
from fedhead.data import IntArray, KeyArray, held_out, load_samples, relabel, require_kind, require_labels
from fedhead.devices import Precision, pick_device
from fedhead.errors import FedheadError, UserError
from fedhead.features import FeatureStore
from fedhead.messages import Manifest, WeightsChunk

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_BETWEEN_PROGRESS = 30.0
WARM = 3
"""How many backbones, and how many runs' features, a site keeps at hand."""
_WHAT_A_HOLDING_DEPENDS_ON = {"backbone_digest", "classes", "multi_label", "holdout", "seed"}

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
        keys: of all rows of `data`, by which the ledger knows them.
    """

    data: LabelledFeatures
    train: SiteRows
    held_out: SiteRows
    summable: SiteRows
    guarded: GuardedRows
    keys: KeyArray


def hold(
    name: str,
    rows: IntArray,
    data: LabelledFeatures,
    labels: IntArray,
    keys: KeyArray,
    manifest: Manifest,
    guard: Guard,
) -> Holding:
    """Hold rows out, and let the guard withhold what must not be computed on.

    Args:
        name: of the site.
        rows: `[n]`, its rows of `data`.
        data: features and labels.
        labels: `[N]` or `[N, C]`, the same labels in memory.
        keys: `[N]`, what rows are held out by.
        manifest: names the classes, and the share held out.
        guard: the site's own.
    """
    out = held_out(keys[rows], manifest.holdout, manifest.seed)
    guarded = guard.allowed_rows(rows, labels[rows], out, manifest.classes)
    return Holding(
        data=data,
        train=SiteRows(name, guarded.train),
        held_out=SiteRows(name, guarded.held_out),
        summable=SiteRows(name, guard.summable(guarded.held_out, labels[guarded.held_out])),
        guarded=guarded,
        keys=keys,
    )


class Site(Protocol):
    """One site, as the `ClientApp` sees it; it decides its own data, device and limits."""

    name: str
    num_rows: int
    ledger: Ledger | None

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

    def open(self, manifest: Manifest) -> Holding:
        """Return what the guard leaves of the site's rows, after extracting features if that was not done yet.

        Raises:
            FedheadError: if the data cannot be read.
        """


class LocalSite:
    """A site whose data is on this machine."""

    def __init__(
        self,
        name: str,
        data: str,
        device: str = "auto",
        strict_data: bool = False,
        guard: Guard | None = None,
        ledger: Ledger | None = None,
        precision: Precision = "float32",
    ) -> None:
        self.name = name
        self.device = pick_device(device)
        self.strict_data = strict_data
        self.precision = precision
        self.guard = guard or Guard()
        self.ledger: Ledger | None = ledger or Ledger(ledger_path(name), self.guard.min_class_count)
        self.data = data
        self.samples = load_samples(data)
        self.num_rows = len(self.samples)
        self._backbones: dict[str, Backbone] = {}
        self._holdings: dict[str, Holding] = {}

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
        if weights_path(manifest.weights_digest).is_file():
            return None
        partial = PartialWeights(manifest.weights_digest, chunk.file, self.name)
        return None if partial.add(chunk.offset, chunk.data.data, chunk.size) else partial.received

    def check_data(self, manifest: Manifest) -> None:
        require_kind(manifest.backbone, manifest.kind, self.samples.kind)
        labels = self._labels(manifest)
        all_rows = np.arange(len(labels))
        refuse_if_withheld(self.guard.allowed_rows(all_rows, labels, np.zeros(len(labels), np.bool_), manifest.classes))

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        backbone = self._backbone(manifest)
        check_backbone(backbone, backbone.probe(), manifest, probe)

    def open(self, manifest: Manifest) -> Holding:
        key = manifest.model_dump_json(include=_WHAT_A_HOLDING_DEPENDS_ON)
        holding = self._holdings.get(key) or self._hold(manifest)
        _keep(self._holdings, key, holding)
        return holding

    def _hold(self, manifest: Manifest) -> Holding:
        store = self._store(self._backbone(manifest))
        labels = self._labels(manifest)
        data = LabelledFeatures(store.features.to(self.device), torch.from_numpy(labels).to(self.device))
        holding = hold(self.name, store.readable(), data, labels, store.keys, manifest, self.guard)
        refuse_if_withheld(holding.guarded)
        if holding.guarded.withheld:
            logger.warning("The guard withholds rows: %s.", dict(holding.guarded.withheld))
        return holding

    def _store(self, backbone: Backbone) -> FeatureStore:
        last_said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal last_said
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

    def _labels(self, manifest: Manifest) -> IntArray:
        require_labels(self.samples, manifest.multi_label)
        try:
            return relabel(self.samples, manifest.classes)
        except UserError as error:
            # It names a file, and a file's name may be a person's.
            logger.error("%s", error)
            raise FedheadError(
                "Its data has a class that this run does not know; the site's own log names it, and the file."
            ) from None

    def _find_backbone(self, manifest: Manifest) -> Backbone | None:
        if manifest.backbone_digest not in self._backbones:
            found = find_backbone(manifest.backbone, manifest.layer, manifest.weights_digest)
            if found is None:
                return None
            _keep(self._backbones, manifest.backbone_digest, found.to(self.device))
        return self._backbones[manifest.backbone_digest]

    def _backbone(self, manifest: Manifest) -> Backbone:
        found = self._find_backbone(manifest)
        if found is None:
            raise FedheadError(f"The weights of {manifest.backbone} are not installed at {self.name}.")
        return found


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
    if backbone.digest != manifest.backbone_digest:
        raise FedheadError(
            f"{manifest.backbone} is fed or built differently here than at the coordinator (backbone digest "
            f"{backbone.digest[:12]}…, not {manifest.backbone_digest[:12]}…); install the coordinator's versions of "
            "fedhead and torchvision."
        )
    same_shape = own_probe.shape == probe.shape
    distance = float((own_probe - probe).norm() / probe.norm().clamp_min(1e-12)) if same_shape else float("inf")
    if not distance <= PROBE_TOLERANCE:
        raise FedheadError(
            f"{manifest.backbone} gives other features here than at the coordinator: they differ by {distance:.1g} of "
            f"their norm on the probe, where {PROBE_TOLERANCE:g} is allowed. Install the coordinator's versions of "
            "torch and torchvision, or use another --device."
        )
