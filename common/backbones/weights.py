"""Where a machine keeps backbones it was sent, under their weights' digest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedhead.backbones.backbone import Backbone, digest_weights, files_of, load_backbone
from fedhead.backbones.catalogue import entry_of
from fedhead.errors import FedheadError
from fedhead.files import digest_file, disk_errors, flush, home, replaced, safe_name


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


def export_weights(backbone: Backbone) -> Path:
    """Return a file of a backbone's weights, as they are sent to sites; it is written if it is not there yet."""
    path = weights_path(backbone.weights_digest)
    if not path.is_file():
        backbone.save(path)
    return path


def install_weights(blob: bytes, weights_digest: str) -> Path:
    """Verify a safetensors file and keep it under its digest; it is never needed again.

    Raises:
        FedheadError: if it is damaged or of another digest; nothing is kept then.
    """
    path = weights_path(weights_digest)
    if not path.is_file():
        with replaced(path) as temporary:
            temporary.write_bytes(blob)
            _verify(temporary, weights_digest)
    return path


class PartialWeights:
    """A file of weights as it arrives, chunk by chunk; what arrived survives a restart.

    Args:
        weights_digest: of the backbone's tensors: where the file is kept once it is complete.
        file_digest: SHA-256 of the file that is sent. Another file of the same weights is another partial one.
        owner: who receives it; several sites of one machine do not write to one file.
    """

    def __init__(self, weights_digest: str, file_digest: str, owner: str) -> None:
        self._weights_digest = weights_digest
        self._file_digest = file_digest
        name = f"{weights_digest[:16]}-{file_digest[:16]}-{safe_name(owner)}.part"
        self._path = home() / "weights" / name

    @property
    def received(self) -> int:
        """How many bytes are here."""
        return self._path.stat().st_size if self._path.is_file() else 0

    def add(self, offset: int, chunk: bytes | memoryview, size: int) -> bool:
        """Append what begins at `offset`, if that is what is missing next; return whether all `size` bytes are here.

        Raises:
            FedheadError: if the complete file is damaged or of another digest; nothing is kept then.
        """
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if offset == self.received:
                with self._path.open("ab") as file:
                    file.write(chunk)
        if self.received < size:
            return False
        try:
            found = digest_file(self._path)
            if found != self._file_digest:
                raise FedheadError(
                    f"The weights that arrived have the SHA-256 {found[:12]}…, not {self._file_digest[:12]}… as the "
                    "coordinator said: they were changed on the way, or there. None of it is kept; start the run "
                    "again, and if it happens again compare the weights at the coordinator with their source."
                )
            _verify(self._path, self._weights_digest)
            flush(self._path)
            self._path.replace(weights_path(self._weights_digest))
        finally:
            self._path.unlink(missing_ok=True)
        return True


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
            f"The weights that arrived have the digest {found[:12]}…, not {weights_digest[:12]}… as the run says. "
            "None of it is kept; ask the coordinator which weights the run is to have."
        )


class _Lazily(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is looked up."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())
