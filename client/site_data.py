"""What a site holds: its rows as features under a run's backbone, and which of them are held out."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.weights import find_backbone, install_weights
from fedhead.client.training import LabelledFeatures, SiteRows
from fedhead.data import held_out, load_samples, relabel
from fedhead.devices import pick_device
from fedhead.errors import FedheadError
from fedhead.features import FeatureStore
from fedhead.messages import Manifest

PROBE_TOLERANCE = 1e-3
"""Relative to the probe's norm; devices differ by less, other preprocessing or weights by more."""


@dataclass(frozen=True)
class Holding:
    """A site's rows, ready for training."""

    data: LabelledFeatures
    train: SiteRows
    held_out: SiteRows


class Site(Protocol):
    """One site, as the `ClientApp` sees it; it decides its own data, device and limits."""

    name: str
    num_rows: int

    def has_weights(self, manifest: Manifest) -> bool:
        """Tell whether the backbone's weights are here."""

    def install(self, manifest: Manifest, blob: bytes) -> None:
        """Verify and keep the backbone's weights.

        Raises:
            FedheadError: if they are not what the manifest says.
        """

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        """Check that this site can take part: the same features of the probe, and known classes.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on.
        """

    def open(self, manifest: Manifest) -> Holding:
        """Return the site's rows, after extracting their features if that was not done yet.

        Raises:
            FedheadError: if the data cannot be read.
        """


class LocalSite:
    """A site whose data is on this machine."""

    def __init__(self, name: str, data: str, device: str = "auto", strict_data: bool = False) -> None:
        self.name = name
        self.device = pick_device(device)
        self.strict_data = strict_data
        self.samples = load_samples(data)
        self.num_rows = len(self.samples)
        self._backbones: dict[str, Backbone] = {}
        self._stores: dict[str, FeatureStore] = {}

    def has_weights(self, manifest: Manifest) -> bool:
        return self._find_backbone(manifest) is not None

    def install(self, manifest: Manifest, blob: bytes) -> None:
        install_weights(blob, manifest.weights_digest)

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        relabel(self.samples, manifest.classes)
        backbone = self._backbone(manifest)
        check_backbone(backbone, backbone.probe(), manifest, probe)

    def open(self, manifest: Manifest) -> Holding:
        if manifest.backbone_digest not in self._stores:
            self._stores[manifest.backbone_digest] = FeatureStore.open(
                self._backbone(manifest), self.samples, strict=self.strict_data
            )
        store = self._stores[manifest.backbone_digest]
        labels = torch.from_numpy(relabel(self.samples, manifest.classes))
        rows = store.readable()
        out = held_out(store.keys, manifest.holdout, manifest.seed)[rows]
        return Holding(
            LabelledFeatures(store.features.to(self.device), labels.to(self.device)),
            train=SiteRows(self.name, rows[~out]),
            held_out=SiteRows(self.name, rows[out]),
        )

    def _find_backbone(self, manifest: Manifest) -> Backbone | None:
        if manifest.backbone_digest not in self._backbones:
            found = find_backbone(manifest.backbone, manifest.layer, manifest.weights_digest)
            if found is None:
                return None
            self._backbones[manifest.backbone_digest] = found.to(self.device)
        return self._backbones[manifest.backbone_digest]

    def _backbone(self, manifest: Manifest) -> Backbone:
        found = self._find_backbone(manifest)
        if found is None:
            raise FedheadError(f"The weights of {manifest.backbone} are not installed at {self.name}.")
        return found


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
