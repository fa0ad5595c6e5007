"""Storage of received backbones on a machine, by their weights' digest."""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedhead.backbones.backbone import Backbone, files_of, load_backbone
from fedhead.backbones.catalogue import entry_of
from fedhead.backbones.digests import digest_weights
from fedhead.errors import FedheadError
from fedhead.files import digest_file, disk_errors, flush, home, safe_name

PACKAGED = ("bundled:", "features:", "identity:")
"""Prefixes of specs whose weights, if any, come with the package."""

_NO_ROOM = (
    "The site's disk has no room for the rest of the weights. Free some space there, or point its FEDHEAD_HOME to "
    "another disk."
)


def weights_path(weights_digest: str) -> Path:
    """Return the path of the weights with this digest, existing or not."""
    return home() / "weights" / f"{weights_digest}.safetensors"


def find_backbone(spec: str, layer: str, weights_digest: str) -> Backbone | None:
    """Return the backbone if its weights are on this machine, without downloading; otherwise None.

    They may be installed, included in the package, or in the cache of the source's library.

    Raises:
        UserError: if there is no such spec or layer.
    """
    if weights_path(weights_digest).is_file():
        return load_backbone(spec, weights=str(weights_path(weights_digest)), layer=layer)
    return own_backbone(spec, layer, weights_digest)


def own_backbone(spec: str, layer: str, weights_digest: str) -> Backbone | None:
    """Return the backbone if its weights come with the package or are in its library's cache; otherwise None.

    Raises:
        UserError: if there is no such spec or layer.
    """
    if spec.startswith(PACKAGED):
        backbone = load_backbone(spec, layer=layer)
        if backbone.weights_digest == weights_digest:
            return backbone
    return _in_a_librarys_cache(spec, layer, weights_digest)


def _in_a_librarys_cache(spec: str, layer: str, weights_digest: str) -> Backbone | None:
    entry = entry_of(spec)
    if entry is None or entry.weights is None:
        return None
    # A hub model is more than its weights: the library finds the rest beside them.
    weights = "default" if spec.startswith("hf:") else str(entry.weights)
    try:
        backbone = load_backbone(spec, weights=weights, layer=layer)
    # A damaged cache is treated as missing: the coordinator has the weights.
    except FedheadError:
        return None
    return backbone if (backbone.spec, backbone.weights_digest) == (spec, weights_digest) else None


def installed_weights(spec: str) -> list[Path]:
    """Return the files that coordinators sent for a spec; each layer and set of weights has its own file."""
    found = []
    for path in sorted((home() / "weights").glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("spec") == spec:
                    found.append(path)
        except (OSError, SafetensorError):
            continue
    return found


def export_weights(backbone: Backbone) -> Path:
    """Return the file of a backbone's weights for sending to sites, written if it does not exist."""
    path = weights_path(backbone.weights_digest)
    if not path.is_file():
        backbone.save(path)
    return path


class PartialWeights:
    """A file of weights being received in chunks; a restart continues with the received ones.

    Each owner has one such file at a time, so that interrupted transfers do not fill the disk.

    Args:
        weights_digest: of the backbone's tensors, which determines the final path.
        file_digest: SHA-256 of the sent file. Another file of the same weights has another partial file.
        size: of the whole file, in bytes.
        owner: the receiver; several sites on one machine do not share a file.
    """

    def __init__(self, weights_digest: str, file_digest: str, size: int, owner: str) -> None:
        self._weights_digest = weights_digest
        self._file_digest = file_digest
        self._size = size
        self._owner = safe_name(owner)
        self._path = home() / "weights" / f"{self._owner}.{weights_digest[:16]}-{file_digest[:16]}-{size}.part"

    @property
    def received(self) -> int:
        """The number of received bytes."""
        return self._path.stat().st_size if self._path.is_file() else 0

    def add(self, offset: int, chunk: bytes | memoryview) -> bool:
        """Append a chunk if it begins at the first missing byte; return whether the file is complete.

        Raises:
            FedheadError: if the disk has no room for the rest, or the complete file is damaged or has another digest;
                it is discarded then.
        """
        if offset == self.received and offset + len(chunk) <= self._size:
            self._append(chunk)
        if self.received < self._size:
            return False
        try:
            found = digest_file(self._path)
            if found != self._file_digest:
                raise FedheadError(
                    f"The weights that arrived have the SHA-256 {found[:12]}… instead of {self._file_digest[:12]}… "
                    "announced by the coordinator: they were changed in transit or at the coordinator. They are "
                    "discarded; restart the run, and if it happens again, compare them with their source."
                )
            _verify(self._path, self._weights_digest)
            flush(self._path)
            self._path.replace(weights_path(self._weights_digest))
        finally:
            self._path.unlink(missing_ok=True)
        return True

    def _append(self, chunk: bytes | memoryview) -> None:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room()
            try:
                with self._path.open("ab") as file:
                    file.write(chunk)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise FedheadError(_NO_ROOM) from None
                raise

    def _make_room(self) -> None:
        mine = re.compile(rf"{re.escape(self._owner)}\.[0-9a-f]{{16}}-[0-9a-f]{{16}}-[0-9]+\.part")
        for other in self._path.parent.iterdir():
            if other != self._path and mine.fullmatch(other.name):
                other.unlink(missing_ok=True)
        if shutil.disk_usage(self._path.parent).free < self._size - self.received:
            raise FedheadError(_NO_ROOM)


def _verify(path: Path, weights_digest: str) -> None:
    """Check that a file holds the weights of a digest.

    Raises:
        FedheadError: if it does not.
    """
    try:
        with safe_open(path, framework="pt") as file:
            files = files_of(file.metadata() or {})
            found = digest_weights(_Lazily(file), files)
    except (SafetensorError, ValueError) as error:
        raise FedheadError(f"The weights that arrived cannot be read: {error}.") from None
    if found != weights_digest:
        raise FedheadError(
            f"The weights that arrived have the digest {found[:12]}… instead of the run's {weights_digest[:12]}…. "
            "They are discarded; ask the coordinator which weights the run should use."
        )


class _Lazily(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, read lazily."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())
