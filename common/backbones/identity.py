"""`identity:COLUMN,COLUMN`: the numbers of a table's rows themselves, by the names of their columns.

`identity` alone uses all columns of the data; `identity_for` replaces it by the spec with their names. It has no
weights. Its digest covers the names and their order, so that two sites agree on the meaning of each feature.

`COLUMN=LEVEL` is 1 in rows with that level of a categorical column, else 0. `COLUMN?` may lack numbers: it is then 0,
and a flag after all numbers is 1. A solved head moves the zeros to the pooled mean: see `fedhead.solvers.filling`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor, nn

from fedhead.backbones.backbone import Backbone, backbone_sources
from fedhead.backbones.preprocessing import PROBES, Batch
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.data import Columns, Item, Kind, RowError, Samples, TableRow, require_kind
from fedhead.data.number_rows import select
from fedhead.errors import UserError

NAME = "identity"
FLAG = "?"
"""Mark of a column that may be missing, after its name."""


def identity_for(spec: str, samples: Samples) -> str:
    """Return `spec`, with the columns or the width of the samples if it is `identity` or `features` alone.

    Raises:
        UserError: if they are not rows of numbers.
    """
    if spec in (NAME, "features"):
        require_kind(spec, "table", samples.kind)
    if spec == "features":
        return f"features:{len(samples.columns)}"
    return identity_spec(samples.columns, samples.incomplete) if spec == NAME and samples.columns else spec


def identity_spec(columns: Sequence[str], incomplete: Collection[str] = ()) -> str:
    """Return the spec of the identity backbone of these columns; commas in a name are written `%2C`.

    Args:
        columns: the names of the numbers.
        incomplete: those that may be missing.
    """
    return f"{NAME}:{','.join(_screened(name) + FLAG * (name in incomplete) for name in columns)}"


def parse_columns(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the columns of a spec without its source, and those of them that may be missing.

    Raises:
        UserError: if a column is named twice.
    """
    parts = name.split(",")
    columns = tuple(unquote(part.removesuffix(FLAG), errors="surrogateescape") for part in parts)
    if twice := next((one for one in columns if columns.count(one) > 1), None):
        raise UserError(f"The backbone identity names the column {twice!r} twice.")
    return columns, tuple(one for one, part in zip(columns, parts, strict=True) if part.endswith(FLAG))


def flags_of(spec: str) -> tuple[tuple[int, int], ...]:
    """Return the positions of each feature that may be missing and of its flag; none for another backbone."""
    source, _, name = spec.partition(":")
    if source != NAME or not name:
        return ()
    columns, incomplete = parse_columns(name)
    return tuple((columns.index(one), len(columns) + place) for place, one in enumerate(incomplete))


def marks_of(spec: str) -> dict[int, str]:
    """Return the positions and names of the features that are 1 in some rows and 0 in others: levels, and flags."""
    source, _, name = spec.partition(":")
    if source != NAME or not name:
        return {}
    columns, _ = parse_columns(name)
    levels = {place: column for place, column in enumerate(columns) if "=" in column}
    return levels | {flag: f"{columns[place]}{FLAG}" for place, flag in flags_of(spec)}


@backbone_sources.register(NAME)
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build the backbone whose features are the numbers of the named columns, and flags of missing ones, as float32.

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
    columns, incomplete = parse_columns(name)
    spec = identity_spec(columns, incomplete)
    module = nn.Identity()
    if weights not in ("default", "random"):
        assign_weights(module, read_weights(weights), set(), spec, weights)
    return Backbone(spec, module, NumberPreprocessing(columns, incomplete))


@dataclass(frozen=True)
class NumberPreprocessing:
    """A map from a row of numbers to a tensor of the named ones.

    Attributes:
        columns: `[d]`, the names, in the order of the features.
        incomplete: `[f]`, the columns that may be missing.
    """

    columns: tuple[str, ...]
    incomplete: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """Always "table"."""
        return "table"

    def __call__(self, item: Item) -> Tensor:
        """Return the values, with 0 for missing ones, and the flags of missing values as float32 `[d + f]`.

        Raises:
            RowError: for a row with an unknown level, a missing number of a column that may not be missing, and numbers
                beyond float32.
            UserError: for an item of another kind, and rows without one of the columns.
        """
        if not isinstance(item, TableRow):
            raise UserError("The backbone identity takes rows of numbers, but was given an image or a text.")
        values = select(item, self.columns)
        lacking = np.isnan(values)
        if lacking.any():
            lost = [self.columns[place] for place in np.flatnonzero(lacking)]
            if unmarked := [name for name in lost if name not in self.incomplete]:
                raise RowError(
                    f"A row has no value in the column {unmarked[0]!r}. Fill in the values, or mark the column as one "
                    f"that may be missing, as in '{identity_spec(unmarked[:1], unmarked[:1])}'."
                )
            values = np.where(lacking, 0.0, values)
        if (beyond := np.abs(values) > np.finfo(np.float32).max).any():
            name = self.columns[int(beyond.argmax())]
            raise RowError(f"The column {name!r} has the value {values[beyond][0]:g}, too large for a feature.")
        flags = [float(lacking[self.columns.index(name)]) for name in self.incomplete]
        return torch.from_numpy(np.concatenate([values, flags]).astype(np.float32))

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return the batch `[n, d + f]`."""
        return torch.stack(list(inputs))

    def probes(self) -> Sequence[Item]:
        """Return rows of noise."""
        columns = Columns(self.columns)
        noise = np.random.default_rng(0).standard_normal((PROBES, len(self.columns)))
        return [TableRow(columns, values) for values in noise]

    def describe(self) -> dict[str, Any]:
        """Return the names."""
        described = {"columns": list(self.columns)}
        return {**described, "incomplete": list(self.incomplete)} if self.incomplete else described


def _screened(name: str) -> str:
    return quote(name, safe=" /:;=()[]{}!*'~@+$#<>|^\"\\", errors="surrogateescape") if _must(name) else name


def _must(name: str) -> bool:
    return any(character in name for character in f",%{FLAG}\n\r\0")
