"""Similarity of inputs: cosines of features whitened by their covariance within classes, from the sums of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.data.inputs import Input
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.foreign import Distances
from fedhead.heads.feature_map import Basis, unit_rows
from fedhead.model import TransferModel
from fedhead.sums.features import FeatureStatistics

MOST_PAIRED = 20_000
"""Most rows of which all pairs are compared."""

THRESHOLDS = 4000
"""Bins of cosines from -1 to 1, for thresholds."""

_BATCH = 64
_PAIRED = 1024
_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosine similarity after within-class covariance normalisation, WCCN (Hatch et al., Interspeech 2006).

    With the mean `m` and `A A^T = S^-1` for the shrunk covariance `S` within classes, a row `x` becomes
    `z = (x - m) A`, scaled to unit length. Directions in which rows of one class differ count less than those in which
    classes differ. Without classes, `S` is the total covariance.

    Attributes:
        centre: `[d]`, the mean `m`.
        whiten: `[d, d]`, `A`.
        form: of the rows `x`, given features.
    """

    centre: Tensor
    whiten: Tensor
    form: Basis = "none"

    @classmethod
    def from_distances(cls, distances: Distances) -> Self:
        """Return the similarity by the whitening of a model's test for foreign inputs."""
        return cls(distances.centre.double(), distances.whiten.double(), distances.form)

    @classmethod
    def from_statistics(cls, stats: FeatureStatistics) -> Self:
        """Return the similarity by the covariance within classes of sums over plain features.

        Raises:
            UserError: if there are no rows, or no feature varies.
        """
        return cls.from_distances(Distances.from_statistics(stats, "none"))

    def embed(self, features: Tensor) -> Tensor:
        """Return rows of unit length `[n, d]`, float64, whose products are similarities; 0 for a row at the mean.

        Raises:
            FedheadError: if a feature of `features` `[n, d]` is not finite.
        """
        if not bool(features.isfinite().all()):
            raise FedheadError("The backbone produces a feature that is not finite.")
        rows = features.detach().cpu().double()
        return torch.nn.functional.normalize((unit_rows(rows, self.form) - self.centre) @ self.whiten, dim=1)


@dataclass(frozen=True)
class Match:
    """A row that is similar to a query.

    Attributes:
        row: its number.
        similarity: from -1 to 1.
    """

    row: int
    similarity: float


@dataclass(frozen=True)
class Verification:
    """Figures of deciding by a similarity whether two rows have the same class, over all pairs of rows.

    Attributes:
        rows: the number of rows.
        same: pairs of one class.
        different: pairs of two classes.
        equal_error_rate: the share of wrong decisions among both kinds of pairs, at the threshold that makes them
            equal.
        threshold: this similarity; pairs at or above it count as the same class.
        nearest: the share of rows whose most similar other row has their class, among those with another row of it.
    """

    rows: int
    same: int
    different: int
    equal_error_rate: float
    threshold: float
    nearest: float


@torch.inference_mode()
def embed_inputs(model: TransferModel, similarity: Similarity, inputs: Sequence[Input]) -> Tensor:
    """Return the embeddings `[n, d]` of inputs.

    Raises:
        UserError: naming the first input that cannot be read.
    """
    blocks = []
    for start in range(0, len(inputs), _BATCH):
        items = []
        for one in inputs[start : start + _BATCH]:
            try:
                items.append(one.read())
            except FedheadError as error:
                raise UserError(f"{one.name} cannot be compared: {error}") from None
        blocks.append(similarity.embed(model.backbone.features_of(items)))
    return torch.cat(blocks)


def embedded(similarity: Similarity, features: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Yield the embeddings of stored features' `rows`, block by block."""
    for block in torch.split(rows, _ROWS):
        yield similarity.embed(features[block])


def most_similar(
    queries: Tensor, similarity: Similarity, features: Tensor, rows: Tensor, top: int
) -> list[list[Match]]:
    """Return the most similar stored rows of each query, the most similar first; ties by row number.

    Args:
        queries: `[q, d]`, embedded.
        similarity: embeds the stored rows, block by block.
        features: `[n, d]`, stored.
        rows: the numbers of the rows to search, ascending.
        top: rows per query, at least 1.
    """
    values = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    for block, found in zip(torch.split(rows, _ROWS), embedded(similarity, features, rows), strict=True):
        values = torch.cat([values, queries @ found.T], 1)
        places = torch.cat([places, block.expand(len(queries), -1)], 1)
        # A stable sort keeps the lower row number first.
        order = values.argsort(dim=1, descending=True, stable=True)[:, :top]
        values, places = values.gather(1, order), places.gather(1, order)
    return [
        [Match(row, max(-1.0, min(1.0, value))) for row, value in zip(*pair, strict=True)]
        for pair in zip(places.tolist(), values.tolist(), strict=True)
    ]


def verify(embeddings: Tensor, labels: Tensor) -> Verification:
    """Evaluate similarities as a test of whether two rows have the same class, over all pairs.

    Args:
        embeddings: `[n, d]`, of unit length.
        labels: `[n]`, class numbers.

    Raises:
        UserError: if there are no pairs of one class or none of two, or too many rows.
    """
    count = len(labels)
    if count > MOST_PAIRED:
        raise UserError(f"All pairs of {count} rows are too many to compare; give {MOST_PAIRED:,} rows or fewer.")
    same = np.zeros(THRESHOLDS, np.int64)
    other = np.zeros(THRESHOLDS, np.int64)
    hits, judged = 0, 0
    for start in range(0, count, _PAIRED):
        part = slice(start, start + _PAIRED)
        cosines = embeddings[part] @ embeddings.T
        alike = labels[part, None] == labels
        mine = torch.arange(start, start + len(cosines))
        cosines[torch.arange(len(cosines)), mine] = -2.0
        after = torch.arange(count) > mine[:, None]
        same += _binned(cosines[alike & after])
        other += _binned(cosines[~alike & after])
        has_twin = alike.sum(1) > 1
        nearest = labels[cosines.argmax(1)] == labels[part]
        hits += int((nearest & has_twin).sum())
        judged += int(has_twin.sum())
    if not same.sum() or not other.sum():
        raise UserError("A threshold needs pairs of rows of one class, and pairs of two classes; this data has not.")
    rate, threshold = equal_error(same, other)
    return Verification(count, int(same.sum()), int(other.sum()), rate, threshold, hits / judged)


def equal_error(same: npt.NDArray[np.int64], different: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the equal error rate and its threshold, from pairs counted in equal bins of similarity from -1 to 1."""
    missed = np.concatenate([[0], np.cumsum(same)]) / same.sum()
    passed = 1 - np.concatenate([[0], np.cumsum(different)]) / different.sum()
    place = int(np.argmin(np.abs(missed - passed)))
    return float(missed[place] + passed[place]) / 2, -1 + 2 * place / len(same)


def _binned(cosines: Tensor) -> npt.NDArray[np.int64]:
    places = ((cosines.clamp(-1, 1) + 1) * (THRESHOLDS / 2)).long().clamp(max=THRESHOLDS - 1)
    return torch.bincount(places, minlength=THRESHOLDS).numpy()
