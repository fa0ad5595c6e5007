"""`features:WIDTH` or `features:WIDTH:NAME`: embeddings of a pipeline of one's own, from data `features:FILE`.

The name says which encoder made them, as in `features:1024:uni`. Sites agree on it by the backbone's digest, but
nothing can verify it.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedhead.backbones.backbone import Backbone, backbone_sources
from fedhead.backbones.identity import NumberPreprocessing
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.errors import UserError

NAME = "features"
MOST_FEATURES = 65_536


@backbone_sources.register(NAME)
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build the backbone whose features are embeddings that the data itself holds.

    Args:
        name: the width, with an optional name of the encoder.
        weights: `default`, `random`, or the file of a saved backbone; it contains no weights.
        layer: only `penultimate`.
        seed: not used.

    Raises:
        UserError: for another layer, an invalid width, and a file with weights.
    """
    if layer != "penultimate":
        raise UserError(f"The backbone features has only the layer 'penultimate', not {layer!r}.")
    width, _, encoder = name.partition(":")
    if not width.isdecimal() or not 0 < int(width[:6]) <= MOST_FEATURES:
        raise UserError(
            f"The backbone features has a width from 1 to {MOST_FEATURES}, as in 'features:1024', not {width!r}."
        )
    spec = f"{NAME}:{int(width)}" + (f":{encoder}" if encoder else "")
    module = nn.Identity()
    if weights not in ("default", "random"):
        assign_weights(module, read_weights(weights), set(), spec, weights)
    columns = tuple(f"x{position}" for position in range(int(width)))
    return Backbone(spec, module, EmbeddingPreprocessing(columns, encoder=encoder))


@dataclass(frozen=True)
class EmbeddingPreprocessing(NumberPreprocessing):
    """A map from a row of embeddings to a tensor.

    Attributes:
        encoder: the name of the encoder; empty if not given.
    """

    encoder: str = ""

    def describe(self) -> dict[str, Any]:
        """Return the width and the name of the encoder."""
        return {"width": len(self.columns), "encoder": self.encoder}
