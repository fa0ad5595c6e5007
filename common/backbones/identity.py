"""`identity:COLUMN,COLUMN`: the numbers of a table's rows themselves, by the names of their columns.

`identity` alone uses all columns of the data; `identity_for` replaces it by the spec with their names. It has no
weights. Its digest covers the names and their order, so that two sites agree on the meaning of each feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor, nn

from fedhead.backbones.backbone import Backbone, backbone_sources
from fedhead.backbones.preprocessing import PROBES, Batch
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.data import Columns, Item, Kind, Samples, TableRow, require_kind
from fedhead.data.number_rows import require_columns
from fedhead.errors import UserError

NAME = "identity"


def identity_for(spec: str, samples: Samples) -> str:
    """Return `spec`, with the columns of the samples if it is `identity` alone.

    Raises:
        UserError: if they are not rows of numbers.
    """
    if spec == NAME:
        require_kind(NAME, "table", samples.kind)
    return identity_spec(samples.columns) if spec == NAME and samples.columns else spec


def identity_spec(columns: Sequence[str]) -> str:
    """Return the spec of the identity backbone of these columns; commas in a name are written `%2C`."""
    return f"{NAME}:{','.join(_screened(name) for name in columns)}"


@backbone_sources.register(NAME)
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build the backbone whose features are the numbers of the named columns, as float32.

    Args:
        name: the columns, comma-separated.
        weights: `default`, `random`, or the file of a saved backbone; it contains no weights.
        layer: only `penultimate`.
        seed: not used.

    Raises:
        UserError: for another layer, a column named twice or without a name, and a file with weights.
    """
    if layer != "penultimate":
        raise UserError(f"The backbone identity has only the layer 'penultimate', not {layer!r}.")
    columns = tuple(unquote(part, errors="surrogateescape") for part in name.split(","))
    if twice := next((one for one in columns if columns.count(one) > 1), None):
        raise UserError(f"The backbone identity names the column {twice!r} twice.")
    spec = identity_spec(columns)
    module = nn.Identity()
    if weights not in ("default", "random"):
        assign_weights(module, read_weights(weights), set(), spec, weights)
    return Backbone(spec, module, NumberPreprocessing(columns))


@dataclass(frozen=True)
class NumberPreprocessing:
    """A map from a row of numbers to a tensor of the named ones.

    Attributes:
        columns: `[d]`, the names, in the order of the features.
    """

    columns: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """Always "table"."""
        return "table"

    def __call__(self, item: Item) -> Tensor:
        """Return the values as float32 `[d]`.

        Raises:
            UserError: for an item of another kind, a row without one of the columns, and numbers beyond float32.
        """
        if not isinstance(item, TableRow):
            raise UserError("The backbone identity takes rows of numbers, but was given an image or a text.")
        if item.columns.names == self.columns:
            values = item.values
        else:
            require_columns(item.columns.names, self.columns)
            values = item.values[[item.columns.positions[name] for name in self.columns]]
        if (beyond := np.abs(values) > np.finfo(np.float32).max).any():
            name = self.columns[int(beyond.argmax())]
            raise UserError(f"The column {name!r} has the value {values[beyond][0]:g}, too large for a feature.")
        return torch.from_numpy(values.astype(np.float32))

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return the batch `[n, d]`."""
        return torch.stack(list(inputs))

    def probes(self) -> Sequence[Item]:
        """Return rows of noise."""
        columns = Columns(self.columns)
        noise = np.random.default_rng(0).standard_normal((PROBES, len(self.columns)))
        return [TableRow(columns, values) for values in noise]

    def describe(self) -> dict[str, Any]:
        """Return the names."""
        return {"columns": list(self.columns)}


def _screened(name: str) -> str:
    return quote(name, safe=" /:;=()[]{}!*'~@+$#<>|^\"\\", errors="surrogateescape") if _must(name) else name


def _must(name: str) -> bool:
    return any(character in name for character in ",%\n\r\0")
