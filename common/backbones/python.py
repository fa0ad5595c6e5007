"""`python:MODULE:FUNCTION`: a module of the user's own, with its preprocessing.

The function takes nothing and returns `(module, preprocessing)`, or a `Backbone`. In a file `mine.py`:

    from fedhead.backbones import ImagePreprocessing

    def encoder():
        module = ...  # takes [n, 3, 224, 224]; gives vectors, maps or sequences
        return module, ImagePreprocessing.imagenet(224)

The module's output is the penultimate layer, and `--layer` takes any module inside it. Its code does not travel: every
site needs the same file. Its weights do.
"""

import torch
from torch import nn

from fedhead.backbones.backbone import Backbone, backbone_sources, fill_weights, read_weights
from fedhead.backbones.layers import PENULTIMATE, Stopped
from fedhead.data.python import user_function
from fedhead.errors import FedheadError, UserError


@backbone_sources.register("python")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Call the function, and take what it returns as far as `layer`.

    Args:
        name: `MODULE:FUNCTION`; the module is looked for in the current folder too.
        weights: `default` for those that the function gives its module, or a file.
        layer: `penultimate` for the module's own output, or the name of a module inside it.
        seed: what random numbers start from when the function is called.

    Raises:
        UserError: if the function does not exist, fails, returns something else, or its module does not run.
    """
    spec = f"python:{name}"
    if weights == "random":
        raise UserError(f"{spec} has the weights that its function gives it: let this be 'default', or name a file.")
    made = _call(spec, seed)
    module, preprocessing = made.module, made.preprocessing
    try:
        if layer != PENULTIMATE:
            module = Stopped(
                module, layer, spec, preprocessing.collate(list(map(preprocessing, preprocessing.probes())))
            )
        if weights != "default":
            fill_weights(module, read_weights(weights)).require(module.state_dict().keys(), spec, weights)
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
    # It is the user's code that runs here.
    except Exception as error:
        raise UserError(
            f"The module of '{spec}' does not run on what its preprocessing makes: {type(error).__name__}: {error}"
        ) from error
    return backbone


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
