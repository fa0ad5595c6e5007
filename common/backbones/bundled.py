"""`bundled:glyphnet` and `bundled:pixels`: what the package itself carries."""

from importlib.resources import as_file, files

import torch
from torch import nn

from fedhead.backbones.backbone import Backbone, assign_weights, backbone_sources, read_weights
from fedhead.backbones.glyphnet import INPUT_SIZE, MEAN, STD, GlyphNet
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.errors import UserError
from fedhead.registry import suggest

PIXELS = 32


@backbone_sources.register("bundled")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build `glyphnet`, pretrained on machine-rendered letters, or `pixels`, which transfers nothing.

    Raises:
        UserError: for another name or layer, and for weights that do not fit.
    """
    if layer != "penultimate":
        raise UserError(f"bundled:{name} has only the layer 'penultimate', not {layer!r}.")
    if name == "glyphnet":
        return _glyphnet(weights, seed)
    if name == "pixels":
        if weights not in ("default", "random"):
            raise UserError("bundled:pixels has no weights to load.")
        square = (PIXELS, PIXELS)
        return Backbone("bundled:pixels", nn.Flatten(), ImagePreprocessing(3, square, None, (0.5,) * 3, (0.5,) * 3))
    raise UserError(f"There is no bundled backbone {name!r}. {suggest(name, ['glyphnet', 'pixels'])}")


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
