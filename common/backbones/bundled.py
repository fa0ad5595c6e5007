"""`bundled:glyphnet`, `bundled:pixels` and `bundled:logmel`: the backbones included in the package."""

from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import nn

from fedhead.backbones.audio import RATE, LogMel, logmel_preprocessing
from fedhead.backbones.backbone import Backbone, backbone_sources
from fedhead.backbones.catalogue import Catalogue, Entry, catalogues, image_input
from fedhead.backbones.glyphnet import INPUT_SIZE, MEAN, STD, GlyphNet
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.errors import UserError
from fedhead.registry import suggest

PIXELS = 32


@backbone_sources.register("bundled")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build `glyphnet`, pretrained on machine-rendered letters, or a baseline without transfer.

    `pixels` is an image itself, `logmel` statistics of a clip's spectrogram.

    Raises:
        UserError: for another name or layer, and for weights that do not fit.
    """
    if layer != "penultimate":
        raise UserError(f"bundled:{name} has only the layer 'penultimate', not {layer!r}.")
    if name == "glyphnet":
        return _glyphnet(weights, seed)
    if name in ("pixels", "logmel"):
        module = nn.Flatten() if name == "pixels" else LogMel()
        if weights not in ("default", "random"):
            # A saved model's own backbone is a file, even if it has no weights.
            assign_weights(module, read_weights(weights), set(), f"bundled:{name}", weights)
        if name == "logmel":
            return Backbone("bundled:logmel", module, logmel_preprocessing())
        square = (PIXELS, PIXELS)
        return Backbone("bundled:pixels", module, ImagePreprocessing(3, square, None, (0.5,) * 3, (0.5,) * 3))
    raise UserError(f"There is no bundled backbone {name!r}. {suggest(name, names())}")


def names() -> list[str]:
    """Return the names."""
    return ["glyphnet", "logmel", "pixels"]


def entry(name: str) -> Entry:
    """Return the catalogue entry of a bundled backbone.

    Raises:
        UserError: for another name.
    """
    if name == "logmel":
        return Entry("bundled:logmel", f"sound, {RATE // 1000} kHz", parameters=0, licence="Apache-2.0")
    if name == "pixels":
        return Entry("bundled:pixels", image_input(3, PIXELS, PIXELS), parameters=0, licence="Apache-2.0")
    if name == "glyphnet":
        path = Path(str(files("fedhead.backbones") / "glyphnet.safetensors"))
        return Entry(
            "bundled:glyphnet",
            image_input(1, INPUT_SIZE, INPUT_SIZE),
            parameters=sum(parameter.numel() for parameter in GlyphNet().parameters()),
            licence="Apache-2.0",
            weights=path,
        )
    raise UserError(f"There is no bundled backbone {name!r}. {suggest(name, names())}")


catalogues.register("bundled")(Catalogue(names, entry))


def _glyphnet(weights: str, seed: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = GlyphNet()
    if weights == "default":
        with as_file(files("fedhead.backbones") / "glyphnet.safetensors") as path:
            assign_weights(module, read_weights(str(path)), set(), "bundled:glyphnet", str(path))
    elif weights != "random":
        assign_weights(module, read_weights(weights), set(), "bundled:glyphnet", weights)
    preprocessing = ImagePreprocessing(1, (INPUT_SIZE, INPUT_SIZE), None, (MEAN,), (STD,))
    return Backbone("bundled:glyphnet", module, preprocessing, trained=weights != "random")
