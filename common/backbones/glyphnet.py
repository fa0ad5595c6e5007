"""GlyphNet: the bundled backbone, a small network for small greyscale glyphs.

It was trained on rendered letters only, by `fedhead.simulations.pretrain`, which reproduces its weights.
"""

from collections import OrderedDict

from torch import nn

INPUT_SIZE = 16
"""Rows and columns of the input."""

MEAN = 0.25
STD = 0.35
"""Grey levels in `[0, 1]` (1 is a full stroke, 0 the background) become `(level - MEAN) / STD`."""

NUM_FEATURES = 192
"""Width of the output."""


class GlyphNet(nn.Sequential):
    """A map from standardised grey levels `[n, 1, 16, 16]` to features `[n, 192]`.

    The children run in order. Batch norms have been folded into the convolutions, and the features have mean 0 and
    variance 1 over letters.
    """

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                stage1=_stage(1, 32, 32),
                pool1=nn.MaxPool2d(2),
                stage2=_stage(32, 64, 64),
                pool2=nn.MaxPool2d(2),
                stage3=_stage(64, 128, 128),
                pool3=nn.AvgPool2d(2),
                flatten=nn.Flatten(),
                features=nn.Linear(512, NUM_FEATURES),
            )
        )


def _stage(width_in: int, width: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width_out, 3, padding=1),
        nn.ReLU(),
    )
