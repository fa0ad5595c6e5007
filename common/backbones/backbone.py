"""Backbone: a frozen feature extractor, never separated from its preprocessing and its digests."""

import copy
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from fedhead.backbones.pooling import pool, poolings
from fedhead.backbones.preprocessing import Batch, Preprocessing
from fedhead.data import Item, Kind
from fedhead.errors import UserError
from fedhead.files import replaced
from fedhead.registry import Registry

BackboneSource = Callable[[str, str, str, int], "Backbone"]
"""What a source registers: a function of name, weights, layer and seed."""

backbone_sources: Registry[BackboneSource] = Registry(
    "backbone source",
    {name: f"fedhead.backbones.{name}" for name in ("bundled", "hf", "python", "timm", "torchvision", "vectors")},
)

FORMAT = "fedhead-backbone-1"


class Backbone:
    """A frozen map from images, or from texts, to features `[n, d]`.

    Frozen means: no gradient, eval mode, buffers unmoved, the same features twice.

    Args:
        spec: `source:name`.
        module: takes a batch `[n, channels, height, width]`, or of texts `input_ids` and `attention_mask`, both
            `[n, length]`, by name; returns `[n, d]`, or maps or sequences that are pooled to it.
        preprocessing: what makes the batch from images or texts.
        layer: which layer's output `module` returns.
        pooling: how maps and sequences become vectors, a name in `fedhead.backbones.pooling.poolings`.
        trained: False for random weights.
        files: texts that module and preprocessing are built from beside the weights (a configuration, a tokenizer), by
            name; they travel with the weights.

    Raises:
        UserError: if there is no such pooling.
    """

    def __init__(
        self,
        spec: str,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        layer: str = "penultimate",
        pooling: str = "mean",
        trained: bool = True,
        files: Mapping[str, str] | None = None,
    ) -> None:
        _ = poolings[pooling]
        self.spec = spec
        self.module = module.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.layer = layer
        self.pooling = pooling
        self.trained = trained
        self.files = dict(files or {})

    def __repr__(self) -> str:
        return f"Backbone({self.spec!r}, layer={self.layer!r}, {self.num_features} features)"

    def pooled(self, pooling: str) -> Self:
        """Return this backbone with another pooling, which its layer's name then says."""
        twin = copy.copy(self)
        for name in ("digest", "num_features"):
            twin.__dict__.pop(name, None)
        twin.layer, twin.pooling = f"{self.layer}:{pooling}", pooling
        return twin

    @property
    def kind(self) -> Kind:
        """What it takes: "image" or "text"."""
        return self.preprocessing.kind

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((tensor.device for tensor in self.module.state_dict().values()), torch.device("cpu"))

    def to(self, device: torch.device) -> Self:
        """Move the weights."""
        self.module.to(device)
        return self

    def running(self, module: nn.Module) -> Self:
        """Return this backbone, digests included, with `module`, which computes the same, in place of its own."""
        same = copy.copy(self)
        for name in ("digest", "weights_digest", "num_parameters", "num_bytes", "num_features"):
            same.__dict__[name] = getattr(self, name)
        same.module = module
        return same

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, in canonical order; batch counters, which nothing reads, left out."""
        state = self.module.state_dict()
        return {name: state[name] for name in sorted(state) if not name.endswith("num_batches_tracked")}

    @cached_property
    def num_parameters(self) -> int:
        """How many numbers `tensors` holds."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @cached_property
    def num_bytes(self) -> int:
        """How many bytes `tensors` takes: what shipping the backbone costs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the canonically ordered tensors, and the files where there are any: what must be transported."""
        return digest_weights(self.tensors(), self.files)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over spec, weights, layer, pooling and preprocessing: what keys cached features."""
        described = {
            "spec": self.spec,
            "weights": self.weights_digest,
            "layer": self.layer,
            "pooling": self.pooling,
            "preprocessing": self.preprocessing.describe(),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @cached_property
    def num_features(self) -> int:
        """`d`."""
        return self.probe().shape[1]

    @torch.inference_mode()
    def features(self, batch: Batch) -> Tensor:
        """Return float32 features `[n, d]` of a preprocessed batch, on the backbone's device.

        Raises:
            UserError: if the layer's output is no vector, map or sequence per row.
        """
        output: Tensor
        if isinstance(batch, Tensor):
            rows, mask = len(batch), None
            output = self.module(batch.to(self.device))
        else:
            moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
            rows, mask = len(moved["input_ids"]), moved["attention_mask"]
            output = self.module(**moved)
        output = pool(output, self.pooling, mask)
        if output.ndim != 2 or len(output) != rows:
            raise UserError(
                f"Layer {self.layer!r} of {self.spec} gives {list(output.shape)} for {rows} {self.kind}s; "
                "expected a vector, a map or a sequence for each."
            )
        return output.to(torch.float32)

    def features_of(self, items: Sequence[Item]) -> Tensor:
        """Return float32 features `[n, d]` of images or texts, on the backbone's device."""
        return self.features(self.preprocessing.collate([self.preprocessing(item) for item in items]))

    def probe(self) -> Tensor:
        """Return the features `[PROBES, d]` of fixed images or texts, by which two machines tell that they agree."""
        return self.features_of(self.preprocessing.probes()).cpu()

    def to_bytes(self) -> bytes:
        """Return the backbone as a safetensors file: weights, and how to build and feed the module."""
        return save(self._tensors_to_save(), self._metadata())

    def save(self, path: Path | str) -> None:
        """Write `to_bytes` to `path`, whole or not at all, with one copy of the weights in memory beside the module."""
        with replaced(Path(path)) as temporary:
            try:
                save_file(self._tensors_to_save(), temporary, self._metadata())
            except SafetensorError as error:
                # It tells what the operating system said only in words.
                if number := re.search(r"os error (\d+)", str(error)):
                    raise OSError(int(number[1]), os.strerror(int(number[1])), str(temporary)) from error
                raise

    def _tensors_to_save(self) -> dict[str, Tensor]:
        return {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "spec": self.spec,
            "layer": self.layer,
            "digest": self.digest,
            "weights_digest": self.weights_digest,
            **({"files": json.dumps(self.files, sort_keys=True)} if self.files else {}),
        }

    @staticmethod
    def load(path: Path | str) -> "Backbone":
        """Read what `save` wrote.

        Raises:
            UserError: if the file is not a backbone's, is damaged, or builds another one here.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"The backbone {path} cannot be read: {error}.") from None
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a backbone that fedhead saved; give it as weights of a backbone.")
        backbone = load_backbone(metadata["spec"], weights=str(path), layer=metadata["layer"])
        if backbone.digest != metadata["digest"]:
            raise UserError(
                f"{path} gives another backbone here than where it was saved: it is damaged, or this version "
                f"of {metadata['spec'].partition(':')[0]} builds or feeds {metadata['spec']} differently."
            )
        return backbone


def load_backbone(spec: str, *, weights: str = "default", layer: str = "penultimate", seed: int = 0) -> Backbone:
    """Build the backbone that a spec `source:name` names.

    Args:
        spec: such as `bundled:glyphnet` or `torchvision:resnet18`.
        weights: `default`, a safetensors or state-dict file, or `random`.
        layer: `penultimate`, or the name of a layer of the source's; with a pooling where the layer gives maps or
            sequences that are not to be pooled as usual, as in `layer3:max` or `penultimate:cls`.
        seed: draws random weights.

    Raises:
        UserError: for an unknown source, name, layer or pooling, and for weights that do not fit.
    """
    source, name = split_spec(spec)
    layer, pooling = split_layer(layer)
    backbone = backbone_sources[source](name, weights, layer, seed)
    return backbone.pooled(pooling) if pooling else backbone


def split_spec(spec: str) -> tuple[str, str]:
    """Split `source:name`.

    Raises:
        UserError: if a part is missing, or there is no such source.
    """
    source, colon, name = spec.partition(":")
    if not colon or not name:
        raise UserError(f"A backbone is named source:name, as in 'bundled:glyphnet', not {spec!r}.")
    _ = backbone_sources[source]
    return source, name


def split_layer(layer: str) -> tuple[str, str | None]:
    """Split `LAYER:POOLING`, where a layer's own name may end in a number, as in `hidden:3`.

    Raises:
        UserError: if there is no such pooling.
    """
    name, colon, pooling = layer.rpartition(":")
    if not colon or pooling.isdigit():
        return layer, None
    _ = poolings[pooling]
    return name or "penultimate", pooling


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_weights(tensors: Mapping[str, Tensor], files: Mapping[str, str]) -> str:
    """Return `digest_tensors`, or with files the SHA-256 of it and of theirs, in the order of the names."""
    digest = digest_tensors(tensors)
    if not files:
        return digest
    parts = [digest, *(f"{name}\0{hashlib.sha256(files[name].encode()).hexdigest()}" for name in sorted(files))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_files(path: str) -> dict[str, str]:
    """Return the files that a saved backbone holds beside its weights; none for other weights.

    Raises:
        UserError: if they are damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return files_of(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}
    except ValueError as error:
        raise UserError(f"The weights {path} cannot be read: {error}.") from None


def files_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the files in a safetensors file's metadata.

    Raises:
        ValueError: if they are not texts by name.
    """
    files = json.loads(metadata.get("files", "{}"))
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise ValueError("its files are not texts by name")
    return files


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a safetensors file or a state dict, without running anything that it holds.

    Raises:
        UserError: if it is missing, damaged, or holds more than tensors.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no weights file {path!r}. Expected 'default', 'random' or the path of a "
            "safetensors or state-dict file."
        )
    try:
        return load_file(path)
    except SafetensorError as not_safetensors:
        if path.endswith(".safetensors"):
            raise UserError(f"The weights {path} cannot be read: {not_safetensors}.") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"The weights {path} are neither safetensors nor a plain state dict: they hold Python objects, which could "
            "run code and are not loaded (a whole model that was saved, perhaps), or no weights at all. Save the "
            "model's state_dict()."
        ) from error
    # torch.load raises nearly anything on damaged input.
    except Exception as error:
        raise UserError(
            f"The weights {path} are neither safetensors nor a plain state dict, or the file is cut short: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    for nested in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"The weights {path} hold more than named tensors; save the model's state_dict().")
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


@dataclass(frozen=True)
class WeightsFit:
    """How a file's weights fit a module that they were copied into.

    Attributes:
        missing: names that only the module has, batch counters left out.
        unknown: names that only the file has.
        reshaped: what differs in shape, in words.
    """

    missing: frozenset[str]
    unknown: frozenset[str]
    reshaped: tuple[str, ...]

    def require(self, needed: Collection[str], spec: str, path: str) -> None:
        """Check that everything is there and nothing else.

        Args:
            needed: those of the module's names that may not be missing.
            spec: the backbone, for messages.
            path: the file, for messages.

        Raises:
            UserError: naming the keys that are missing, unknown or of another shape.
        """
        wrong = (
            ("missing", sorted(self.missing.intersection(needed))),
            ("unknown", sorted(self.unknown)),
            ("of another shape", self.reshaped),
        )
        if any(names for _, names in wrong):
            parts = [
                f"{words}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
                for words, names in wrong
                if names
            ]
            raise UserError(f"The weights {path} are not those of {spec}; {'; '.join(parts)}.")


def fill_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> WeightsFit:
    """Copy `weights` into `module`, which may rename those of older versions of itself as it takes them in."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = OrderedDict((name, weights[name]) for name in weights if not name.endswith("num_batches_tracked"))
    # A safetensors file names no version; some modules refuse that.
    metadata = getattr(weights, "_metadata", {"": getattr(module.state_dict(), "_metadata", {}).get("", {})})
    given._metadata = metadata  # type: ignore[attr-defined]
    try:
        result = module.load_state_dict(given, strict=False)
    except RuntimeError:
        shapes = [(name, list(given[name].shape), list(own[name].shape)) for name in sorted(own.keys() & given.keys())]
        reshaped = tuple(f"{name} is {theirs}, not {ours}" for name, theirs, ours in shapes if theirs != ours)
        if not reshaped:
            raise
        return WeightsFit(frozenset(own.keys() - given.keys()), frozenset(given.keys() - own.keys()), reshaped)
    missing = frozenset(name for name in result.missing_keys if not name.endswith("num_batches_tracked"))
    return WeightsFit(missing, frozenset(result.unexpected_keys), ())


def assign_weights(module: nn.Module, weights: Mapping[str, Tensor], ignored: set[str], spec: str, path: str) -> None:
    """Copy `weights` into `module`, to the last key.

    Args:
        module: what to fill.
        weights: by name; must hold all of the module's but batch counters.
        ignored: names that `weights` may hold although the module does not (a classifier that was cut off).
        spec: the backbone, for messages.
        path: the file, for messages.

    Raises:
        UserError: naming the keys that are missing, unexpected or of another shape.
    """
    fit = fill_weights(module, {name: tensor for name, tensor in weights.items() if name not in ignored})
    fit.require(module.state_dict().keys(), spec, path)
