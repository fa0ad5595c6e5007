"""Backbone: a frozen feature extractor together with its preprocessing and its digests."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from fedhead.backbones.digests import digest_weights
from fedhead.backbones.geometry import DENSE_SIZE, MAP, Geometry, split_map, split_maps
from fedhead.backbones.pooling import pool, poolings
from fedhead.backbones.preprocessing import Batch, ImagePreprocessing, Preprocessing
from fedhead.backbones.proposals import PROPOSALS, Proposals, Proposer, split_proposals
from fedhead.backbones.state_dict import require_finite
from fedhead.data import Item, Kind
from fedhead.data.items import ITEMS
from fedhead.errors import UserError
from fedhead.files import replaced
from fedhead.registry import Registry
from fedhead.wording import listed

BackboneSource = Callable[[str, str, str, int], "Backbone"]
"""Type of a registered source: a function of name, weights, layer and seed."""

backbone_sources: Registry[BackboneSource] = Registry(
    "backbone source",
    {
        name: f"fedhead.backbones.{name}"
        for name in ("bundled", "features", "hf", "identity", "python", "timm", "torchvision", "vectors")
    },
)

detecting: Registry[Callable[[str], bool]] = Registry(
    "source of detectors", {name: f"fedhead.backbones.{name}" for name in ("hf", "python", "torchvision")}
)
"""Functions by source that return whether a name is a detector's."""

FORMAT = "fedhead-backbone-1"

PLACES = "places"
"""Name of a layer for finding objects: the proposals of a detector, or `OBJECT_MAPS`."""

OBJECT_MAPS = "maps/8@416"


class Backbone:
    """A frozen map from images, texts, clips or rows of numbers to features `[n, d]`.

    Frozen means: no gradients, eval mode, constant buffers, and reproducible features.

    Args:
        spec: `source:name`.
        module: takes a batch `[n, channels, height, width]`, or by name: for texts `input_ids` and `attention_mask`,
            both `[n, length]`, for clips `clips` `[n, length, ...]` and `lengths` `[n]`; returns `[n, d]`, or maps or
            sequences for pooling.
        preprocessing: converts items to a batch.
        layer: the name of the layer whose output `module` returns.
        pooling: the conversion of maps and sequences to vectors, a name in `fedhead.backbones.pooling.poolings`; of
            several layers, a name for each, joined by `+`.
        trained: False for random weights.
        files: texts needed to build module and preprocessing in addition to the weights (a configuration, a tokenizer),
            by name; they are sent with the weights.

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
        for name in pooling.split("+"):
            _ = poolings[name]
        self.spec = spec
        self.module = module.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.layer = layer
        self.pooling = pooling
        self.trained = trained
        self.files = dict(files or {})

    def __repr__(self) -> str:
        return f"Backbone({self.spec!r}, layer={self.layer!r}, {self.num_features} features)"

    def pooled(self, pooling: str, layer: str = "") -> Self:
        """Return this backbone with another pooling, which becomes part of the layer's name, or with a new name."""
        twin = copy.copy(self)
        for name in ("digest", "geometry", "num_features"):
            twin.__dict__.pop(name, None)
        twin.layer, twin.pooling = layer or f"{self.layer}:{pooling}", pooling
        return twin

    @property
    def kind(self) -> Kind:
        """The kind of its items: "image", "text", "table" or "audio"."""
        return self.preprocessing.kind

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((tensor.device for tensor in self.module.state_dict().values()), torch.device("cpu"))

    def to(self, device: torch.device) -> Self:
        """Move the weights."""
        self.module.to(device)
        return self

    def running(self, module: nn.Module) -> Self:
        """Return this backbone, with the same digests, running an equivalent `module`."""
        same = copy.copy(self)
        for name in ("digest", "weights_digest", "num_parameters", "num_bytes", "geometry", "num_features"):
            same.__dict__[name] = getattr(self, name)
        same.module = module
        return same

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, in canonical order, without the unused batch counters."""
        state = self.module.state_dict()
        return {name: state[name] for name in sorted(state) if not name.endswith("num_batches_tracked")}

    @cached_property
    def num_parameters(self) -> int:
        """The number of values in `tensors`."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @cached_property
    def num_bytes(self) -> int:
        """The size of `tensors` in bytes: the cost of sending the backbone."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the canonically ordered tensors, and the files if any: identifies the data to send."""
        return digest_weights(self.tensors(), self.files)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over spec, weights, layer, pooling and preprocessing: the key of cached features."""
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
        """`d`, of an item, or of a place of an item if the backbone keeps maps."""
        return self.probe().shape[1]

    @property
    def num_values(self) -> int:
        """The number of values that are stored of an item."""
        return self.num_features if self.geometry is None else self.geometry.num_values

    @cached_property
    def geometry(self) -> Geometry | None:
        """The maps that the backbone keeps of an item; None if it pools them.

        Raises:
            UserError: if it keeps the maps of some of its layers only.
        """
        kept = {name in (MAP, PROPOSALS) for name in self.pooling.split("+")}
        if kept == {False}:
            return None
        if len(kept) > 1:
            raise UserError(f"Layer {self.layer!r} of {self.spec} keeps the maps of some layers and pools others.")
        output, _ = self._run(self.probe_batch())
        size = self.preprocessing.size if isinstance(self.preprocessing, ImagePreprocessing) else (0, 0)
        if isinstance(output, Tensor) and self.pooling == PROPOSALS:
            return Proposals.from_rows(output, size)
        return Geometry.of(output, size)

    def keeping_maps(self, size: int, layer: str) -> Self:
        """Return this backbone with maps instead of pooled features, of whole images at a height and width `size`."""
        twin = self.pooled("+".join([MAP] * (layer.count("+") + 1)), layer)
        if isinstance(twin.preprocessing, ImagePreprocessing):
            side = size or DENSE_SIZE
            twin.preprocessing = replace(twin.preprocessing, resize=(side, side), crop=None)
        return twin

    @torch.inference_mode()
    def features(self, batch: Batch) -> Tensor:
        """Return float32 features `[n, d]` of a preprocessed batch, or values `[n, V]` of maps, on its device.

        Raises:
            UserError: if the layer's output is not a vector, map or sequence per row.
        """
        output, mask = self._run(batch)
        if isinstance(batch, Tensor):
            rows = len(batch)
        elif "places" in batch:
            rows = len(batch["places"])
            output = self._of_words(output, batch["rows"].to(self.device), batch["places"].to(self.device))
        else:
            rows = len(next(iter(batch.values())))
        output = pool(output, self.pooling, mask)
        if output.ndim != 2 or len(output) != rows:
            raise UserError(
                f"Layer {self.layer!r} of {self.spec} returns {list(output.shape)} for {rows} {ITEMS[self.kind]}; "
                "expected a vector, a map or a sequence for each."
            )
        return output.to(torch.float32)

    @torch.no_grad()
    def _run(self, batch: Batch) -> tuple[Tensor | Sequence[Tensor], Tensor | None]:
        """Return the module's output for a batch, and the mask of the batch, if it has one."""
        # Only copies from page-locked memory to a GPU are asynchronous.
        queued = self.device.type == "cuda"
        if isinstance(batch, Tensor):
            return self.module(batch.to(self.device, non_blocking=queued)), None
        moved = {
            name: tensor.to(self.device, non_blocking=queued)
            for name, tensor in batch.items()
            if name not in ("rows", "places")
        }
        return self.module(**moved), moved.get("attention_mask")

    def _of_words(self, output: Tensor | Sequence[Tensor], rows: Tensor, places: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise UserError(f"Layer {self.layer!r} of {self.spec} gives no vectors of single words.")
        return output[rows, places]

    def batch_of(self, items: Sequence[Item]) -> Batch:
        """Return the preprocessed batch of items."""
        return self.preprocessing.collate([self.preprocessing(item) for item in items])

    def probe_batch(self) -> Batch:
        """Return the preprocessed batch of fixed items."""
        return self.batch_of(self.preprocessing.probes())

    def features_of(self, items: Sequence[Item]) -> Tensor:
        """Return float32 features `[n, d]` of items, on the backbone's device."""
        return self.features(self.batch_of(items))

    def probe(self) -> Tensor:
        """Return the features `[PROBES, d]` of fixed items, or their mean over places, for comparing two machines."""
        items = self.preprocessing.probes()
        if isinstance(self.module, Proposer):
            images = torch.stack([self.preprocessing(item) for item in items])
            with torch.inference_mode():
                return self.module.steady(images.to(self.device)).cpu()
        values = self.features_of(items).cpu()
        return values if self.geometry is None else self.geometry.means(values)

    def to_bytes(self) -> bytes:
        """Return the backbone as a safetensors file: the weights, and instructions for building the module."""
        return save(self._tensors_to_save(), self._metadata())

    def save(self, path: Path | str) -> None:
        """Write `to_bytes` to `path` atomically, with one copy of the weights in memory besides the module."""
        with replaced(Path(path)) as temporary:
            try:
                save_file(self._tensors_to_save(), temporary, self._metadata())
            except SafetensorError as error:
                # safetensors reports the operating system's error only as text.
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
        """Read a file written by `save`.

        Raises:
            UserError: if the file is not a backbone's, is damaged, or yields another backbone here.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"The backbone {path} cannot be read: {error}.") from None
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a backbone saved by fedhead; pass it as the weights of a backbone.")
        backbone = load_backbone(metadata["spec"], weights=str(path), layer=metadata["layer"])
        if backbone.digest != metadata["digest"]:
            raise UserError(
                f"{path} yields another backbone here than where it was saved: it is damaged, or this version "
                f"of {metadata['spec'].partition(':')[0]} builds or preprocesses {metadata['spec']} differently."
            )
        return backbone


def load_backbone(spec: str, *, weights: str = "default", layer: str = "penultimate", seed: int = 0) -> Backbone:
    """Build a backbone by its spec `source:name`.

    Args:
        spec: such as `bundled:glyphnet` or `torchvision:resnet18`.
        weights: `default`, a safetensors or state-dict file, or `random`.
        layer: `penultimate`, or the name of one of the source's layers; optionally with a pooling for a layer with
            maps or sequences, as in `layer3:max` or `penultimate:cls`; or several, as in `layer3+penultimate`, whose
            features are joined. `layer2+layer3:map` keeps the maps of both, and `:map@320` those of images of
            320 x 320; `maps` stands for the layers at strides 4, 8 and 16, and `maps/8` for those at 8, 16 and 32.
            `proposals` or `proposals:150@320` gives a detector's boxes with their features, and `places` these or, of
            other backbones, `maps/8@416`.
        seed: seeds random weights.

    Raises:
        UserError: for an unknown source, name, layer or pooling, and for weights that do not fit.
    """
    source, name = split_spec(spec)
    if layer == PLACES:
        layer = PROPOSALS if proposes(spec) else OBJECT_MAPS
    elif split_proposals(layer) is not None and not proposes(spec):
        raise UserError(f"{spec} is no detector, so it gives no proposals: leave the layer out, or name another one.")
    if split_maps(layer) is not None:
        layer = default_maps(spec, layer)
    taps = [split_layer(part) for part in layer.split("+")]
    if len(taps) > 1 and source != "torchvision":
        raise UserError(f"Several layers can be joined of torchvision's backbones only, not of {spec}.")
    backbone = backbone_sources[source](name, weights, "+".join(tap for tap, _ in taps), seed)
    if backbone.trained:
        parameters = {parameter for parameter, _ in backbone.module.named_parameters()}
        require_finite(backbone.tensors(), parameters, spec, weights)
    pooling = taps[-1][1]
    if (kept := split_map(pooling or ""))[0]:
        return backbone.keeping_maps(kept[1], layer)
    if len(taps) > 1:
        return backbone.pooled("+".join(pooling or "mean" for _, pooling in taps), layer)
    return backbone.pooled(pooling) if pooling else backbone


def proposes(spec: str) -> bool:
    """Return whether a backbone is a detector, whose rows are proposals."""
    source, name = split_spec(spec)
    return source in detecting and detecting[source](name)


def default_maps(spec: str, layer: str) -> str:
    """Return the layers that `maps`, `maps@SIZE` or `maps/STRIDE@SIZE` stands for: the last at each of the strides.

    Raises:
        UserError: if they are not known of the backbone.
    """
    source, name = split_spec(spec)
    asked = split_maps(layer)
    assert asked is not None
    strides = listed([*map(str, asked.strides)], len(asked.strides))
    if source != "torchvision":
        raise UserError(
            f"The layers at the strides {strides} of {spec} are not known: name layers, as in 'layer2:map'."
        )
    from fedhead.backbones.torchvision import map_layers

    if not (found := map_layers(name, asked.strides)):
        raise UserError(f"{spec} has no maps at any of the strides {strides}: name layers, as in 'layer2:map'.")
    return f"{'+'.join(found)}:{MAP}{f'@{asked.size}' if asked.size else ''}"


def split_spec(spec: str) -> tuple[str, str]:
    """Split `source:name`.

    Raises:
        UserError: if a part is missing, or there is no such source.
    """
    source, colon, name = spec.partition(":")
    if spec == "features":
        raise UserError(
            "The backbone features takes the number of embeddings in a row, and optionally the name of their encoder, "
            "as in 'features:1024' or 'features:1024:uni'."
        )
    if spec == "identity":
        raise UserError(
            "The backbone identity takes the columns of a table, but there is no table here: name the columns, "
            "as in 'identity:age,pulse'."
        )
    if not colon or not name:
        raise UserError(f"A backbone has the form source:name, as in 'bundled:glyphnet', not {spec!r}.")
    _ = backbone_sources[source]
    return source, name


def split_layer(layer: str) -> tuple[str, str | None]:
    """Split `LAYER:POOLING`, where a layer's own name may end in a number, as in `hidden:3`.

    Raises:
        UserError: if there is no such pooling.
    """
    name, colon, pooling = layer.rpartition(":")
    if not colon or pooling.isdigit() or split_proposals(layer) is not None:
        return layer, None
    if not split_map(pooling)[0]:
        _ = poolings[pooling]
    return name or "penultimate", pooling


def read_files(path: str) -> dict[str, str]:
    """Return the files in a saved backbone besides its weights; none for other weights.

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
    try:
        files = json.loads(metadata.get("files", "{}"))
    except RecursionError:
        raise ValueError("its files are nested too deeply") from None
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise ValueError("its files are not texts by name")
    return files
