"""The sums of feature statistics, and the means, scales and scatters that they give."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.sums.targets import CLASSES, TargetKind

HARDLY = 1e-12
"""Share of the largest variance below which a feature counts as constant.

Some networks produce such features from float32 rounding; divided by their deviation they would outweigh all others.
"""

_UNIT = torch.finfo(torch.float64).eps


@dataclass(eq=False, slots=True)
class FeatureTotals:
    """Sums over `rows` rows of `d` features `x` and `C` targets: one class, any number of classes, or real numbers.

    All sums are float64 and of `x - origin`: with feature means of 100 and deviations of 0.01, sums of `x`
    itself lose eight digits.

    Attributes:
        origin: `[d]`, subtracted from every row first.
        rows: the number of rows `N`.
        counts: `[C]`, the sum of each target: int64, the rows of each class; float64 for real targets.
        sums: `[C, d]`, the sum of the features times each target: for classes, the sum of each class's rows.
        total: `[d]`, the sum of all rows.
        upper: `[d, d]`, the Gram matrix on and above the diagonal; the entries below are never read.
        kind: the kind of the targets.
        squares: `[C]`, the sum of each real target's squares; `[0]` for classes, since it equals their counts.
        items: the number of items whose places the rows are; 0 if rows are items.
        shares: how many of the first real targets are shares, from 0 to 1; received sums are checked by it.
    """

    origin: Tensor
    rows: int
    counts: Tensor
    sums: Tensor
    total: Tensor
    upper: Tensor
    kind: TargetKind = CLASSES
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    items: int = 0
    shares: int = 0

    @property
    def num_features(self) -> int:
        """`d`."""
        return self.sums.shape[1]

    @property
    def num_classes(self) -> int:
        """`C`."""
        return self.sums.shape[0]

    @property
    def independent(self) -> int:
        """The number of independent rows: of items, if rows are their places."""
        return self.items if self.kind.of_places else self.rows

    @property
    def target_totals(self) -> Tensor:
        """`[C]`, float64, the sum of each target."""
        return self.counts.to(torch.float64)

    @property
    def target_squares(self) -> Tensor:
        """`[C]`, float64, the sum of each target's squares; for 0 and 1, the sum of the targets themselves."""
        return self.squares if self.kind.real else self.target_totals

    def gram(self) -> Tensor:
        """Return a new `[d, d]`, the sum of `(x - origin) (x - origin)^T` over all rows, exactly symmetric."""
        gram = self.upper.triu()
        return gram.add_(gram.triu(1).T)

    def scatter(self) -> Tensor:
        """Return a new `[d, d]`, the Gram matrix about the mean of all rows.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        return self.gram().addr_(self.total, self.total, alpha=-1 / self.rows)

    def within_scatter(self) -> Tensor:
        """Return a new `[d, d]`, the sum over classes of each one's Gram matrix about its own mean."""
        present = self.counts > 0
        scaled = self.sums[present] / self.counts[present, None].to(torch.float64).sqrt()
        return self.gram().addmm_(scaled.T, scaled, alpha=-1)

    def negligible_scatter(self) -> Tensor:
        """Return `[d]`, the diagonal of a scatter below which a feature is constant up to rounding."""
        return negligible(self.upper.diagonal(), self.rows)

    def mean(self) -> Tensor:
        """Return `[d]`, the mean of all rows.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        return self.origin + self.total / self.rows

    def scale(self) -> Tensor:
        """Return `[d]`, the standard deviations over all rows, with 1 for features that count as constant.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        scatter = self.upper.diagonal() - self.total.square() / self.rows
        return torch.where(self.varying(scatter), scatter, self.rows).div(self.rows).sqrt()

    def varying(self, scatter: Tensor) -> Tensor:
        """Return `[d]`, bool: the features with variance beyond rounding and beyond `HARDLY` of the largest.

        Args:
            scatter: `[d]`, the diagonal of a scatter of these rows.
        """
        return scatter > torch.maximum(self.negligible_scatter(), HARDLY * scatter.max())

    @property
    def hardly_varying(self) -> int:
        """The number of features with variance beyond rounding that is so small that they count as constant."""
        if self.rows == 0:
            return 0
        scatter = self.upper.diagonal() - self.total.square() / self.rows
        return int(((scatter > self.negligible_scatter()) & ~self.varying(scatter)).sum())

    def target_mean(self) -> Tensor:
        """Return `[C]`, float64, the mean of each target: for classes, their priors.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        return self.target_totals / self.rows

    def target_scale(self) -> Tensor:
        """Return `[C]`, the targets' standard deviations, with 1 for constant targets.

        Raises:
            UserError: if there are no rows.
        """
        scatter, rows = self.target_scatter(), max(self.rows, 1)
        return torch.where(scatter > 0, scatter, rows).div(rows).sqrt()

    def target_scatter(self) -> Tensor:
        """Return `[C]`, each target's sum of squares about its mean, with 0 for targets that vary only by rounding.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        scatter = self.target_squares - self.target_totals.square() / self.rows
        return torch.where(scatter > negligible(self.target_squares, self.rows), scatter, 0.0)

    def _require_rows(self) -> None:
        if self.rows == 0:
            raise UserError("There are no rows: every site was empty or withheld its rows.")


def negligible(squares: Tensor, rows: int) -> Tensor:
    """Return the sums of squares about the mean below which columns are constant up to rounding.

    The rounding errors of a constant column do not average out: measured, they are a tenth of `rows` units in the last
    place of its sum of squares.

    Args:
        squares: the columns' sums of squares about the origin.
        rows: the number of rows.
    """
    return 2 * _UNIT * (rows + 16) * squares
