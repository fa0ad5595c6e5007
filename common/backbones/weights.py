"""Where a machine keeps backbones it was sent, under their weights' digest."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from fedhead.backbones.backbone import Backbone, digest_weights, files_of, load_backbone
from fedhead.backbones.catalogue import entry_of
from fedhead.errors import FedheadError
from fedhead.files import home, write_atomically


def weights_path(weights_digest: str) -> Path:
    """Return where the weights of this digest are, or would be."""
    return home() / "weights" / f"{weights_digest}.safetensors"


def find_backbone(spec: str, layer: str, weights_digest: str) -> Backbone | None:
    """Return the backbone if its weights are on this machine; None if not, and nothing is downloaded.

    They may have been installed, come with the package, or be in the cache of the library that the source stands for.

    Raises:
        UserError: if there is no such spec or layer.
    """
    if weights_path(weights_digest).is_file():
        return load_backbone(spec, weights=str(weights_path(weights_digest)), layer=layer)
    if spec.startswith("bundled:"):
        backbone = load_backbone(spec, layer=layer)
        if backbone.weights_digest == weights_digest:
            return backbone
    return _in_a_librarys_cache(spec, layer, weights_digest)


def _in_a_librarys_cache(spec: str, layer: str, weights_digest: str) -> Backbone | None:
    entry = entry_of(spec)
    if entry is None or entry.weights is None:
        return None
    # A model of the hub's is more than its weights: the library finds the rest beside them.
    weights = "default" if spec.startswith("hf:") else str(entry.weights)
    try:
        backbone = load_backbone(spec, weights=weights, layer=layer)
    # A cache that is damaged is as good as none: the coordinator has the weights.
    except FedheadError:
        return None
    return backbone if (backbone.spec, backbone.weights_digest) == (spec, weights_digest) else None


def installed_weights(spec: str) -> list[Path]:
    """Return the files that coordinators sent for a spec; runs with other weights or layers have files of their own."""
    found = []
    for path in sorted((home() / "weights").glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("spec") == spec:
                    found.append(path)
        except (OSError, SafetensorError):
            continue
    return found


def install_weights(blob: bytes, weights_digest: str) -> Path:
    """Verify a safetensors file and keep it under its digest; it is never needed again.

    Raises:
        FedheadError: if it is damaged or of another digest; nothing is kept then.
    """
    try:
        received = digest_weights(load(blob), files_of(_metadata(blob)))
    except (SafetensorError, ValueError) as error:
        raise FedheadError(f"The weights that arrived cannot be read: {error}.") from None
    if received != weights_digest:
        raise FedheadError(f"The weights that arrived have the digest {received[:12]}…, not {weights_digest[:12]}….")
    path = weights_path(weights_digest)
    if not path.is_file():
        write_atomically(path, blob)
    return path


def _metadata(blob: bytes) -> dict[str, Any]:
    """Return the metadata of a safetensors file, which the library reads only from a path."""
    length = int.from_bytes(blob[:8], "little")
    metadata: dict[str, Any] = json.loads(blob[8 : 8 + length]).get("__metadata__", {})
    return metadata
