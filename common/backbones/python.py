"""`python:MODULE:FUNCTION`: a user-defined module with its preprocessing.

The function takes no arguments and returns `(module, preprocessing)`, or a `Backbone`. In a file `mine.py`:

    from fedhead.backbones import ImagePreprocessing

    def encoder():
        module = ...  # takes [n, 3, 224, 224]; returns vectors, maps or sequences
        return module, ImagePreprocessing.imagenet(224)

A function that returns `fedhead.backbones.detectors.detector_backbone(model)` gives a detector, for finding objects.

The module's output is the penultimate layer, and `--layer` accepts any module inside it. Its code is not sent: every
site needs the same file. Its weights are sent.
"""

import torch
from torch import nn

from fedhead.backbones.backbone import Backbone, backbone_sources, detecting
from fedhead.backbones.layers import PENULTIMATE, Stopped
from fedhead.backbones.proposals import PROPOSALS
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.data.python import user_function
from fedhead.errors import FedheadError, UserError


@backbone_sources.register("python")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Call the function, and cut the returned module at `layer`.

    Args:
        name: `MODULE:FUNCTION`; the current folder is also searched for the module.
        weights: `default` for the weights set by the function, or a file.
        layer: `penultimate` for the module's own output, or the name of a module inside it.
        seed: seeds random numbers before the function is called.

    Raises:
        UserError: if the function does not exist, fails, returns something else, or its module does not run.
    """
    spec = f"python:{name}"
    if weights == "random":
        raise UserError(f"{spec} uses the weights set by its function: use 'default', or name a file.")
    made = _call(spec, seed)
    module, preprocessing = made.module, made.preprocessing
    try:
        if layer not in (PENULTIMATE, PROPOSALS):
            module = Stopped(
                module, layer, spec, preprocessing.collate(list(map(preprocessing, preprocessing.probes())))
            )
        if weights != "default":
            assign_weights(module, read_weights(weights), set(), spec, weights)
        backbone = Backbone(
            spec,
            module,
            preprocessing,
            layer=layer,
            pooling=made.pooling,
            trained=made.trained,
            files=made.files,
        )
        _ = backbone.num_features
    except FedheadError:
        raise
    # This runs user code, which may raise any error.
    except Exception as error:
        raise UserError(
            f"The module of '{spec}' fails on the output of its preprocessing: {type(error).__name__}: {error}"
        ) from error
    return backbone


@detecting.register("python")
def is_detector(name: str) -> bool:
    """Return whether the function returns a detector."""
    return _call(f"python:{name}", 0).pooling == PROPOSALS


def _call(spec: str, seed: int) -> Backbone:
    function = user_function(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = function()
        except Exception as error:
            raise UserError(f"The function of '{spec}' failed: {type(error).__name__}: {error}") from error
    if isinstance(made, Backbone):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and hasattr(made[1], "collate"):
        return Backbone(spec, *made)
    what = "a module without its preprocessing" if isinstance(made, nn.Module) else f"{type(made).__name__}"
    raise UserError(
        f"'{spec}' returned {what}; expected a Backbone or (module, preprocessing), as in (module, "
        "ImagePreprocessing.imagenet(224))."
    )
