"""The backbones that a site accepts: those it has itself, those that its operator lists, and those a person agreed to.

A backbone decides which numbers of a row enter the sums, so a coordinator that may choose any weights can spell rows
out in them. Weights that neither the package nor a library's cache holds count as unknown, random ones included: a
coordinator can search seeds for weights that serve it.
"""

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.weights import PACKAGED, find_backbone, own_backbone
from fedhead.client.isolation import Isolation
from fedhead.client.settings import DIGEST_PREFIX, MAX_BACKBONE_BYTES
from fedhead.errors import FedheadError
from fedhead.protocol.messages import Manifest
from fedhead.wording import size

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
"""Relative to the probe's norm; devices differ by less, other preprocessing or weights by more."""

Agree = Callable[[Manifest], bool]
"""Returns whether a person at the site agrees to an unknown backbone."""


def nobody_agrees(manifest: Manifest) -> bool:
    """Return False: no person is asked."""
    return False


@dataclass(frozen=True)
class AcceptedBackbones:
    """A site's own rule.

    Attributes:
        allow: specs, with any weights, and weights by `sha256:HEX`.
        max_bytes: the largest file of weights that a coordinator may send.
        agree: asks a person about any other backbone.
        check_features: whether features that single rows out are refused; if not, they are logged.
    """

    allow: frozenset[str] = frozenset()
    max_bytes: int = MAX_BACKBONE_BYTES
    agree: Agree = nobody_agrees
    check_features: bool = True

    def find(self, manifest: Manifest) -> Backbone | None:
        """Return a run's backbone; None if it is accepted and its weights have yet to be sent.

        Raises:
            FedheadError: if the site does not accept it.
            UserError: if there is no such spec or layer.
        """
        spec, layer, digest = manifest.backbone, manifest.layer, manifest.weights_digest
        if not self._lists(manifest):
            self._refuse_code(spec)
            _refuse_folder(spec)
            if (own := own_backbone(spec, layer, digest)) is not None:
                return own
            self.require(manifest)
        return find_backbone(spec, layer, digest)

    def require(self, manifest: Manifest) -> None:
        """Check that a coordinator may send a run's weights.

        Raises:
            FedheadError: if not; it says which line of `site.toml` would allow it.
        """
        if self._lists(manifest):
            return
        self._refuse_code(manifest.backbone)
        if not self.agree(manifest):
            raise FedheadError(
                f"The site does not know these weights of {manifest.backbone}, and takes none from a coordinator "
                "unless its operator allows them. To allow them, add to [backbones] allow in its site.toml: "
                f'"{DIGEST_PREFIX}{manifest.weights_digest}".'
            )

    def require_size(self, spec: str, num_bytes: int) -> None:
        """Check the size that a coordinator claims of a file of weights.

        Raises:
            FedheadError: if it is above the site's limit.
        """
        if num_bytes > self.max_bytes:
            raise FedheadError(
                f"The weights of {spec} have {size(num_bytes)}, and the site takes {size(self.max_bytes)} at most: "
                "[limits] max_backbone_bytes in its site.toml."
            )

    def require_features(self, spec: str, found: Isolation, *, chosen: bool = False) -> None:
        """Check that a backbone's features of the site's rows do not single rows out.

        The package's own backbones only warn: the coordinator chooses the columns of `identity`, but no weights.

        Args:
            spec: of the backbone.
            found: of its features.
            chosen: whether the coordinator chose their weights, whatever the backbone.

        Raises:
            FedheadError: if they do; the site's log has the figures, which are about its rows.
        """
        if not (fault := found.fault()):
            return
        said = f"Sums of the features of {spec} would show single rows of this site: {fault}."
        if not self.check_features or (spec.startswith(PACKAGED) and not chosen):
            logger.warning("%s", said)
            return
        logger.error("%s To take part all the same, set [backbones] check_features = false in site.toml.", said)
        raise FedheadError(
            f"Sums of the features of {spec} would show single rows of the site; its own log says how. Take another "
            "backbone or layer."
        )

    def _lists(self, manifest: Manifest) -> bool:
        return is_listed(self.allow, manifest)

    def _refuse_code(self, spec: str) -> None:
        if _is_code(spec):
            raise FedheadError(
                f"The site runs no code that a coordinator names, and {spec} is a function. To allow it, add to "
                f'[backbones] allow in its site.toml: "{spec}".'
            )


def _refuse_folder(spec: str) -> None:
    """Refuse a folder that a coordinator names: the answer would disclose whether it exists.

    Raises:
        FedheadError: if the spec is of the source `hf` and no name on the hub.
    """
    source, _, name = spec.partition(":")
    if source == "hf" and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name.partition("?")[0]):
        raise FedheadError(
            f"{spec} names a folder, and the site looks into none that a coordinator names. To allow it, add to "
            f'[backbones] allow in its site.toml: "{spec}".'
        )


def is_listed(allow: Collection[str], manifest: Manifest) -> bool:
    """Return whether an operator's list has a run's weights, or any weights of its spec."""
    by_digest = f"{DIGEST_PREFIX}{manifest.weights_digest}" in allow and not _is_code(manifest.backbone)
    return by_digest or manifest.backbone in allow


def origin_of(allow: Collection[str], manifest: Manifest) -> str:
    """Return in words where a backbone is from that a site with this list accepts."""
    if is_listed(allow, manifest):
        return "listed in site.toml"
    if manifest.backbone.startswith(PACKAGED):
        return "part of fedhead"
    return "from this site's own cache of its library"


def _is_code(spec: str) -> bool:
    return spec.partition(":")[0] == "python"


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
