"""Catalogue of the available backbones and their metadata, before they are built.

A source may register a `Catalogue` under its own name; a source without one can be used, but is not listed:

    catalogues.register("ours")(Catalogue(names, entry))
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from fedhead.backbones.backbone import Backbone, backbone_sources, load_backbone, split_spec
from fedhead.backbones.layers import PENULTIMATE
from fedhead.backbones.split import Block, blocks_of
from fedhead.data import Kind
from fedhead.errors import FedheadError, UserError
from fedhead.registry import Registry


@dataclass(frozen=True)
class Entry:
    """Metadata of a backbone before it is built.

    Attributes:
        spec: `source:name`.
        input: a description of its input.
        parameters: of the whole model, including its classifier; None if only building it reveals them.
        licence: of the weights; None if unknown.
        weights: the file with its weights in a library's cache on this machine; None if missing.
        origin: the URL from which the library downloads them; None if there is none.
    """

    spec: str
    input: str
    parameters: int | None = None
    licence: str | None = None
    weights: Path | None = None
    origin: str | None = None


def _penultimate(name: str) -> Sequence[str]:
    return (PENULTIMATE,)


@dataclass(frozen=True)
class Catalogue:
    """The backbones of a source; each of them can be built with `random` weights.

    Attributes:
        names: returns the names, without the source.
        entry: returns the metadata of a name. Raises UserError if there is no such name.
        layers: returns the layers of a name.
    """

    names: Callable[[], Sequence[str]]
    entry: Callable[[str], Entry]
    layers: Callable[[str], Sequence[str]] = _penultimate


catalogues: Registry[Catalogue] = Registry(
    "catalogue", {name: f"fedhead.backbones.{name}" for name in ("bundled", "hf", "timm", "torchvision")}
)


@dataclass(frozen=True)
class Description:
    """Properties of a built backbone.

    Attributes:
        spec: `source:name`.
        kind: the kind of its items, "image" or "text".
        input: a description of its input; empty if the source has none.
        layer: the layer whose output is the features.
        num_features: `d`.
        num_parameters: up to `layer`.
        num_bytes: up to `layer`: sent to each site once.
        licence: of the weights; None if unknown.
        weights: the files on this machine with the weights.
        origin: the URL for downloading them; None if there is none.
    """

    spec: str
    kind: Kind
    input: str
    layer: str
    num_features: int
    num_parameters: int
    num_bytes: int
    licence: str | None
    weights: tuple[Path, ...]
    origin: str | None


def search(pattern: str) -> Iterator[Entry]:
    """Yield the backbones whose spec matches a pattern with `*`, `?` and `[...]`, or contains a text without these.

    Raises:
        UserError: if the pattern names a source that is unknown, has no catalogue, or lacks its library.
    """
    source, colon, _ = pattern.partition(":")
    if not any(wildcard in pattern for wildcard in "*?["):
        pattern = f"{pattern}*" if colon else f"*{pattern}*"
    named = [known for known in catalogues if fnmatchcase(known, source)] if colon else list(catalogues)
    if not named:
        _ = backbone_sources[source]
        raise UserError(f"The backbones of {source!r} cannot be listed: it accepts any name of its form.")
    for known in named:
        try:
            catalogue = catalogues[known]
            names = catalogue.names()
        except UserError:
            if known == source:
                raise
            continue
        for name in names:
            if fnmatchcase(f"{known}:{name}", pattern):
                yield catalogue.entry(name)


def entry_of(spec: str) -> Entry | None:
    """Return the catalogue's entry for a spec; None if the source has no catalogue.

    Raises:
        UserError: if there is no such source or name.
    """
    source, name = split_spec(spec)
    return catalogues[source].entry(name) if source in list(catalogues) else None


def layers_of(spec: str) -> Sequence[str]:
    """Return the names of a backbone's layers; none if its source has no catalogue."""
    source, name = split_spec(spec)
    return catalogues[source].layers(name) if source in list(catalogues) else ()


def describe(spec: str, layer: str, installed: Sequence[Path]) -> Description:
    """Build a backbone, without its weights if its source allows it, and return its properties.

    Args:
        spec: `source:name`.
        layer: see `load_backbone`.
        installed: files on this machine with its weights, in addition to the library's.

    Raises:
        UserError: if there is no such backbone or layer.
        FedheadError: if the weights are needed for the description but not available.
    """
    entry = entry_of(spec)
    backbone = _built(spec, layer)
    return Description(
        spec=spec,
        kind=backbone.kind,
        input="" if entry is None else entry.input,
        layer=backbone.layer,
        num_features=_width(backbone),
        num_parameters=backbone.num_parameters,
        num_bytes=backbone.num_bytes,
        licence=None if entry is None else entry.licence,
        weights=(*([entry.weights] if entry and entry.weights else []), *installed),
        origin=None if entry is None else entry.origin,
    )


def blocks(spec: str, layer: str) -> list[Block]:
    """Return a backbone's blocks, in the order in which they run; built as by `describe`.

    Raises:
        UserError: if the backbone cannot be cut into blocks.
    """
    try:
        return blocks_of(_built(spec, layer))
    except FedheadError:
        raise
    # Code reacts in various ways to missing values.
    except Exception:
        return blocks_of(load_backbone(spec, weights="random", layer=layer))


def _built(spec: str, layer: str) -> Backbone:
    return load_backbone(spec, layer=layer) if entry_of(spec) is None else _without_weights(spec, layer)


def _without_weights(spec: str, layer: str) -> Backbone:
    """Build a backbone without memory for its weights, or if its code needs values, with random ones."""
    try:
        with torch.device("meta"):
            backbone = load_backbone(spec, weights="random", layer=layer)
        _ = _width(backbone)
        return backbone
    except FedheadError:
        raise
    # Code reacts in various ways to missing values.
    except Exception:
        return load_backbone(spec, weights="random", layer=layer)


def _width(backbone: Backbone) -> int:
    """Return `d`, also for missing weights."""
    return backbone.features_of(backbone.preprocessing.probes()).shape[1]


def image_input(channels: int, height: int, width: int) -> str:
    """Return a description of image inputs of this size."""
    return f"{height} x {width}{' grey' if channels == 1 else ''}"
