"""What backbones there are, and what is known of one before it is used.

A source may enter a `Catalogue` under its own name; without one, it is used all the same, but not listed:

    catalogues.register("ours")(Catalogue(names, entry))
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from fedhead.backbones.backbone import Backbone, backbone_sources, load_backbone, split_spec
from fedhead.backbones.layers import PENULTIMATE
from fedhead.data import Kind
from fedhead.errors import FedheadError, UserError
from fedhead.registry import Registry


@dataclass(frozen=True)
class Entry:
    """What is known of a backbone without building it.

    Attributes:
        spec: `source:name`.
        input: what it takes, in words.
        parameters: of the whole model, its classifier included; None where only building it tells.
        licence: of the weights; None where it is not known.
        weights: the file with its weights that a library keeps on this machine; None for none.
        origin: where the library downloads them from; None for nowhere.
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
    """What a source's backbones are; each of them can be built with `random` weights.

    Attributes:
        names: returns the names, without the source.
        entry: returns what is known of a name. Raises UserError if there is no such name.
        layers: returns the layers that a name has.
    """

    names: Callable[[], Sequence[str]]
    entry: Callable[[str], Entry]
    layers: Callable[[str], Sequence[str]] = _penultimate


catalogues: Registry[Catalogue] = Registry(
    "catalogue", {name: f"fedhead.backbones.{name}" for name in ("bundled", "hf", "timm", "torchvision")}
)


@dataclass(frozen=True)
class Description:
    """What a backbone is, once built.

    Attributes:
        spec: `source:name`.
        kind: what it takes, "image" or "text".
        input: what it takes, in words; empty where the source does not tell.
        layer: whose output the features are.
        num_features: `d`.
        num_parameters: up to `layer`.
        num_bytes: up to `layer`: what each site is sent once.
        licence: of the weights; None where it is not known.
        weights: the files on this machine that hold them.
        origin: where they can be downloaded from; None for nowhere.
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
    """Yield the backbones whose spec fits a pattern with `*`, `?` and `[...]`; one without these may stand anywhere.

    Raises:
        UserError: if the pattern names a source that is unknown, has no catalogue, or misses its library.
    """
    source, colon, _ = pattern.partition(":")
    if not any(wildcard in pattern for wildcard in "*?["):
        pattern = f"{pattern}*" if colon else f"*{pattern}*"
    named = [known for known in catalogues if fnmatchcase(known, source)] if colon else list(catalogues)
    if not named:
        _ = backbone_sources[source]
        raise UserError(f"The backbones of {source!r} cannot be listed: it takes any name of its form.")
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
    """Return what a source's catalogue says of a spec; None where the source has no catalogue.

    Raises:
        UserError: if there is no such source or name.
    """
    source, name = split_spec(spec)
    return catalogues[source].entry(name) if source in list(catalogues) else None


def layers_of(spec: str) -> Sequence[str]:
    """Return the names of a backbone's layers; none where its source has no catalogue."""
    source, name = split_spec(spec)
    return catalogues[source].layers(name) if source in list(catalogues) else ()


def describe(spec: str, layer: str, installed: Sequence[Path]) -> Description:
    """Build a backbone, without its weights where its source can, and say what it is.

    Args:
        spec: `source:name`.
        layer: see `load_backbone`.
        installed: files on this machine that hold its weights, beside the library's.

    Raises:
        UserError: if there is no such backbone or layer.
        FedheadError: if only its weights could tell, and these are not to be had.
    """
    entry = entry_of(spec)
    backbone = load_backbone(spec, layer=layer) if entry is None else _without_weights(spec, layer)
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


def _without_weights(spec: str, layer: str) -> Backbone:
    """Build a backbone without memory for its weights, or where its code needs values, with random ones."""
    try:
        with torch.device("meta"):
            backbone = load_backbone(spec, weights="random", layer=layer)
        _ = _width(backbone)
        return backbone
    except FedheadError:
        raise
    # What code does with values that are not there differs from model to model.
    except Exception:
        return load_backbone(spec, weights="random", layer=layer)


def _width(backbone: Backbone) -> int:
    """Return `d`, also of weights that are not there."""
    return backbone.features_of(backbone.preprocessing.probes()).shape[1]


def image_input(channels: int, height: int, width: int) -> str:
    """Return in words what takes images of this size."""
    return f"{height} x {width}{' grey' if channels == 1 else ''}"
