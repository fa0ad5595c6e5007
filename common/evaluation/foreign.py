"""Foreign inputs: how far a row is from everything that a model was solved on, by Mahalanobis distances from sums."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.heads.feature_map import BASES, Basis, unit_rows
from fedhead.solvers.closed_form import ShrunkCorrelation, shrink_correlation
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.foreign import DISTANCES, DistanceSums
from fedhead.sums.sums import Arrays, check_form

MOST_FEATURES = 2048
"""Widest features with distances: their matrix takes 16 MB and is sent to every site."""

SHARE = 0.02
"""Default share of rows like the held-out ones that count as foreign."""

LEAST_ROWS = 20
"""Fewest held-out rows for limits of distances."""

UNLIKE = "unlike anything seen"
"""Remark beside the prediction of a foreign input."""

ABSENT = 1e30
"""Squared norm of the mean of a class without rows, so that it is never the nearest."""

_FORMAT = "fedhead-foreign-1"


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of features from the rows of feature statistics (Lee et al., NeurIPS 2018).

    Rows `x` have unit length: the length of features says little about an input. With square roots, features of
    networks that end in a ReLU are closer to normal. `z = (x - m) whiten` has the identity as its covariance within
    classes, shrunk as for `lda`. The class distance is the root of `min_c |z - z_c|^2 / d`. The background distance is
    that from all rows under their total covariance `I + sum_c p_c z_c z_c^T`. Both are about 1 for rows like the known
    ones. Without classes, both are that from all rows.

    Attributes:
        centre: `[d]`, the mean `m`.
        whiten: `[d, d]`.
        means: `[C, d]`, the class means `z_c`.
        norms: `[C]`, their squared norms, or `ABSENT`.
        between: `[C, d]`; `|z|^2 - |between z|^2` is the squared background distance.
        form: of the rows `x`, given features.
    """

    centre: Tensor
    whiten: Tensor
    means: Tensor
    norms: Tensor
    between: Tensor
    form: Basis = "unit"

    @classmethod
    def from_statistics(cls, stats: FeatureStatistics, form: Basis) -> Self:
        """Return the distances from the rows of statistics, in float32 as they are sent and kept.

        Args:
            stats: sums over rows of unit length.
            form: of these rows.

        Raises:
            UserError: if there are no rows, or no feature varies.
        """
        classes, width = stats.num_classes, stats.num_features
        centre, zeros = stats.mean(), torch.zeros(classes, width, dtype=torch.float64)
        if not stats.kind.exclusive:
            whiten = _whitening(shrink_correlation(stats.scatter(), stats))
            return cls._rounded(form, centre, whiten, zeros, zeros[:, 0], zeros)
        within = stats.within_scatter()
        if bool((within.diagonal() <= stats.negligible_scatter()).all()):
            within = stats.scatter()
        whiten = _whitening(shrink_correlation(within, stats))
        present = stats.counts > 0
        deviations = stats.sums / stats.counts.clamp(min=1)[:, None] + (stats.origin - centre)
        means = torch.where(present[:, None], deviations @ whiten, 0.0)
        norms = torch.where(present, means.square().sum(1), ABSENT)
        return cls._rounded(form, centre, whiten, means, norms, _between(means, stats.counts / stats.rows))

    @classmethod
    def _rounded(
        cls, form: Basis, centre: Tensor, whiten: Tensor, means: Tensor, norms: Tensor, between: Tensor
    ) -> Self:
        return cls(centre.float(), whiten.float(), means.float(), norms.float(), between.float(), form)

    @classmethod
    def from_arrays(cls, arrays: Arrays, width: int, classes: int, form: Basis) -> Self:
        """Read received arrays, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or a value is not finite or too large.
        """
        check_form(arrays, _form(width, classes), ABSENT)
        return cls(**{name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}, form=form)

    def to_arrays(self) -> Arrays:
        """Return the arrays for the wire."""
        return {name: value.numpy() for name, value in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        names = ("centre", "whiten", "means", "norms", "between")
        return {name: getattr(self, name).contiguous() for name in names}

    def __call__(self, features: Tensor) -> Tensor:
        """Return `[n, 2]`, the `DISTANCES` of features `[n, d]`, with torch operations only, since exports trace it."""
        z = (unit_rows(features, self.form) - self.centre.to(features)) @ self.whiten.to(features)
        squares = z.square().sum(1)
        near = squares[:, None] - 2 * (z @ self.means.to(features).T) + self.norms.to(features)
        far = squares - (z @ self.between.to(features).T).square().sum(1)
        squared = torch.stack([near.min(1).values, far], dim=1) / self.centre.shape[0]
        return squared.clamp(min=0).sqrt()


def _form(width: int, classes: int) -> dict[str, Any]:
    shapes = {
        "centre": (width,),
        "whiten": (width, width),
        "means": (classes, width),
        "norms": (classes,),
        "between": (classes, width),
    }
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def _whitening(shrunk: ShrunkCorrelation) -> Tensor:
    """Return `[d, d]`, the `A` with `A A^T = S^-1`; its rows for features that do not vary are 0.

    Raises:
        UserError: if no feature varies.
    """
    if not bool((shrunk.inverse_deviation > 0).any()):
        raise UserError("No feature varies, so there are no distances between rows.")
    factor = torch.linalg.cholesky(shrunk.matrix)
    whitening: Tensor = torch.linalg.solve_triangular(factor, shrunk.inverse_deviation.diag(), upper=False).T
    return whitening


def _between(means: Tensor, shares: Tensor) -> Tensor:
    """Return `[C, d]`, the `K` with `z^T (I + B)^-1 z = |z|^2 - |K z|^2` for `B = sum_c p_c z_c z_c^T`."""
    weighted = shares.sqrt()[:, None] * means
    values, vectors = torch.linalg.eigh(weighted @ weighted.T)
    used = values > 1e-9 * values.max().clamp(min=1e-300)
    # A unit eigenvector of B is `weighted^T v / sqrt(value)`.
    scale = torch.where(used, 1 / (1 + values.clamp(min=0)), 0.0).sqrt()
    between: Tensor = scale[:, None] * (vectors.T @ weighted)
    return between


@dataclass(frozen=True, eq=False)
class Foreign:
    """A test for foreign inputs: distances, and those of the held-out rows of all sites.

    Attributes:
        distances: from the training rows of all sites.
        known: held-out rows by distance.
        share: the share of rows like these that count as foreign, at most.
    """

    distances: Distances
    known: DistanceSums = field(default_factory=DistanceSums)
    share: float = SHARE

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The limits of `DISTANCES`; a row beyond one of them is foreign."""
        return self.known.thresholds(self.share)

    def to_dict(self) -> dict[str, Any]:
        """Return the limits, their share and the rows behind them as JSON types; None for a limit beyond all rows."""
        limits = [None if math.isinf(one) else one for one in self.thresholds]
        return {"rows": self.known.rows, "share": self.share, "limits": dict(zip(DISTANCES, limits, strict=True))}

    def excess(self, features: Tensor) -> Tensor:
        """Return `[n]`, the larger ratio of a distance to its limit; a row of features `[n, d]` is foreign above 1."""
        limits = torch.tensor(self.thresholds, dtype=features.dtype, device=features.device)
        return (self.distances(features) / limits).max(1).values

    def is_foreign(self, features: Tensor) -> list[bool]:
        """Return for each row of features `[n, d]` whether it is foreign; a feature that is not finite is."""
        excess = self.excess(features.double())
        return (~(excess <= 1)).tolist()

    def save(self, path: Path, head_digest: str) -> None:
        """Write a safetensors file that belongs to the model of this head."""
        about = {
            "format": _FORMAT,
            "head_digest": head_digest,
            "share": self.share,
            "form": self.distances.form,
            "counts": self.known.counts.tolist(),
        }
        write_atomically(path, save(self.distances.tensors(), {"foreign": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path, head_digest: str) -> Self | None:
        """Read the file of a model; None if it belongs to another head.

        Raises:
            UserError: if it is damaged.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about: Mapping[str, Any] = json.loads((file.metadata() or {})["foreign"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["format"] != _FORMAT:
                raise ValueError(f"its format is {about['format']!r}")
            if about["head_digest"] != head_digest:
                return None
            arrays = {name: value.numpy() for name, value in tensors.items()}
            classes, width = arrays["means"].shape
            if (form := about["form"]) not in BASES[1:]:
                raise ValueError(f"its rows have the form {form!r}")
            distances = Distances.from_arrays(arrays, width, classes, form)
            return cls(distances, DistanceSums.from_lists(about["counts"]), float(about["share"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, or none that this version reads: {error}.") from None


def foreign_file(model: Path) -> Path:
    """Return the path of the test that belongs to a model's file."""
    return model.with_name(f"{model.stem}.foreign.safetensors")
