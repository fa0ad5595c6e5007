"""Feature statistics: the few sums that say everything about constant features.

Counts, class sums and the Gram matrix of a site's features add (a site joins), subtract (a site leaves) and
extend (a new class). From them come the heads of `fedhead.solvers` and the scores of
`fedhead.scoring`, exactly as if all rows were in one place.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.heads import LinearHead

MAX_WIDTH = 4096
"""Features wider than this are projected before their statistics are taken, unless told otherwise."""

_BLOCK_VALUES = 2**23
_BLOCK_ROWS = 8192
_PANEL = 256
_FORMAT = "fedhead.statistics 1"
_TENSORS = {
    "counts": (torch.int64, 1),
    "gram": (torch.float64, 1),
    "multi_label": (torch.bool, 1),
    "origin": (torch.float64, 1),
    "rows": (torch.int64, 1),
    "sums": (torch.float64, 2),
    "total": (torch.float64, 1),
}
# More than 2^53 rows of float32 features can sum to: what is beyond is no site's, and may overflow when added.
_LARGEST = 1e100
_MOST_ROWS = 2**53
# Sums that contradict each other by less than this share of the largest are taken for rounding.
_CONSISTENCY = 1e-6


@dataclass(eq=False, slots=True)
class FeatureStatistics:
    """Sums over `rows` rows of `d` features `x`, each with one of `C` classes or with any number of them.

    All sums are float64 and of `x - origin`: with feature means of 100 and deviations of 0.01, sums of `x`
    itself lose eight digits. Statistics about one origin add and subtract.

    Attributes:
        origin: `[d]`, what is taken from every row first.
        rows: the number of rows `N`.
        counts: `[C]`, int64, the rows of each class. They sum to `rows`, but for multi-label statistics.
        sums: `[C, d]`, the sum of the rows of each class.
        total: `[d]`, the sum of all rows.
        upper: `[d, d]`, the Gram matrix on and above the diagonal; what is below is never read.
        multi_label: whether a row may have any number of classes, none included.
    """

    origin: Tensor
    rows: int
    counts: Tensor
    sums: Tensor
    total: Tensor
    upper: Tensor
    multi_label: bool = False

    @classmethod
    def empty(
        cls,
        num_features: int,
        num_classes: int,
        origin: Tensor | None = None,
        *,
        multi_label: bool = False,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return the statistics of no rows.

        Args:
            num_features: `d`, at least 1.
            num_classes: `C`, at least 1.
            origin: `[d]`; zeros by default. Best near the features' mean.
            multi_label: whether a row may have any number of classes.
            device: where to accumulate; it must know float64.

        Raises:
            ValueError: if a size or the origin does not fit.
        """
        if num_features < 1 or num_classes < 1:
            raise ValueError(f"Cannot count {num_features} features of {num_classes} classes.")
        zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(
            origin=zeros if origin is None else _checked_origin(origin, num_features).to(device),
            rows=0,
            counts=torch.zeros(num_classes, dtype=torch.int64, device=device),
            sums=torch.zeros(num_classes, num_features, dtype=torch.float64, device=device),
            total=torch.zeros_like(zeros),
            upper=torch.zeros(num_features, num_features, dtype=torch.float64, device=device),
            multi_label=multi_label,
        )

    @classmethod
    def from_features(cls, features: Tensor, labels: Tensor, num_classes: int, origin: Tensor | None = None) -> Self:
        """Return the statistics of rows at hand, accumulated where they are if float64 exists there.

        Args:
            features: `[n, d]`.
            labels: `[n]` class numbers, or `[n, C]` of 0 and 1 for multi-label rows.
            num_classes: `C`.
            origin: `[d]`; zeros by default.

        Raises:
            ValueError: as `update` does.
        """
        if features.ndim != 2:
            raise ValueError(f"Features must be [n, d], not {list(features.shape)}.")
        device = torch.device("cpu") if features.device.type == "mps" else features.device
        multi_label = labels.ndim == 2
        stats = cls.empty(features.shape[1], num_classes, origin, multi_label=multi_label, device=device)
        stats.update(features, labels)
        return stats

    @property
    def num_features(self) -> int:
        """`d`."""
        return self.sums.shape[1]

    @property
    def num_classes(self) -> int:
        """`C`."""
        return self.sums.shape[0]

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows in place, block by block.

        One block of rows is copied to float64 at a time, at most 64 MiB.

        Args:
            features: `[n, d]`, of any number type and on any device.
            labels: `[n]` class numbers, or `[n, C]` of 0 and 1 for multi-label statistics.

        Raises:
            ValueError: if a shape or a label does not fit, in which case nothing was added; or if a feature
                is not finite, in which case the rows of the blocks before it were.
        """
        self._check(features, labels)
        size = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // self.num_features))
        buffer = self.sums.new_empty(min(size, len(features)), self.num_features)
        for start in range(0, len(features), size):
            part = features[start : start + size].to(self.sums.device)
            block = torch.sub(part, self.origin, out=buffer[: len(part)])
            self._add_block(block, labels[start : start + size].to(self.sums.device), start)

    def _check(self, features: Tensor, labels: Tensor) -> None:
        n = len(features)
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"Features must be [n, {self.num_features}], not {list(features.shape)}.")
        if self.multi_label:
            if labels.shape != (n, self.num_classes):
                raise ValueError(f"Labels must be [{n}, {self.num_classes}], not {list(labels.shape)}.")
            if not bool(((labels == 0) | (labels == 1)).all()):
                raise ValueError("Multi-label rows take labels of 0 and 1 only.")
            return
        if labels.shape != (n,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"Labels must be [{n}] class numbers, not {list(labels.shape)} of {labels.dtype}.")
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"Labels must be from 0 to {self.num_classes - 1}, not from {int(labels.min())} to {int(labels.max())}."
            )

    def _add_block(self, block: Tensor, labels: Tensor, start: int) -> None:
        total = block.sum(0)
        if not bool(total.isfinite().all()):
            row = int((~block.isfinite().all(1)).nonzero()[0]) + start
            raise ValueError(f"Row {row} has a feature that is not finite.")
        self.total += total
        self.rows += len(block)
        if self.multi_label:
            targets = labels.to(torch.float64)
            self.counts += targets.sum(0).to(torch.int64)
            self.sums.addmm_(targets.T, block)
        else:
            labels = labels.to(torch.int64)
            self.counts += torch.bincount(labels, minlength=self.num_classes)
            if block.is_cuda:  # where index_add_ adds in no fixed order
                targets = torch.nn.functional.one_hot(labels, self.num_classes).to(torch.float64)
                self.sums.addmm_(targets.T, block)
            else:
                self.sums.index_add_(0, labels, block)
        for left in range(0, self.num_features, _PANEL):
            panel = slice(left, left + _PANEL)
            self.upper[panel, left:].addmm_(block[:, panel].T, block[:, left:])

    def __repr__(self) -> str:
        kind = "multi-label, " if self.multi_label else ""
        return f"FeatureStatistics({kind}{self.rows} rows, {self.num_features} features, {self.num_classes} classes)"

    def copy(self) -> Self:
        """Return statistics that share nothing with these."""
        return type(self)(
            self.origin.clone(),
            self.rows,
            self.counts.clone(),
            self.sums.clone(),
            self.total.clone(),
            self.upper.clone(),
            self.multi_label,
        )

    def __iadd__(self, other: Self) -> Self:
        self._check_same_kind(other)
        self.rows += other.rows
        self.counts += other.counts
        self.sums += other.sums
        self.total += other.total
        self.upper += other.upper
        return self

    def __add__(self, other: Self) -> Self:
        """Return the statistics of both sets of rows.

        Raises:
            ValueError: if sizes, kind or origin differ; see `about`.
        """
        result = self.copy()
        result += other
        return result

    def __radd__(self, other: int) -> Self:
        """Return a copy of `0 + self`, so that `sum` works."""
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented

    def __isub__(self, other: Self) -> Self:
        self._check_same_kind(other)
        if other.rows > self.rows or bool((other.counts > self.counts).any()):
            raise ValueError("Cannot take away statistics of rows that were never added.")
        self.rows -= other.rows
        self.counts -= other.counts
        self.sums -= other.sums
        self.total -= other.total
        self.upper -= other.upper
        # What only rounding can have left.
        self.sums[self.counts == 0] = 0
        self.upper.diagonal().clamp_(min=0)
        if self.rows == 0:
            self.total.zero_()
            self.upper.zero_()
        return self

    def __sub__(self, other: Self) -> Self:
        """Return the statistics without rows that are in them: what they would be had those never come.

        Raises:
            ValueError: if sizes, kind or origin differ, or `other` has more rows of a class.
        """
        result = self.copy()
        result -= other
        return result

    def _check_same_kind(self, other: Self) -> None:
        if self.sums.shape != other.sums.shape or self.multi_label != other.multi_label:
            raise ValueError(f"Cannot combine {self!r} and {other!r}.")
        if not torch.equal(self.origin, other.origin):
            raise ValueError("Cannot combine statistics about different origins; use about() on one of them.")

    def add_class(self) -> Self:
        """Append a class without rows, in place, and return these statistics."""
        self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(1, self.num_features)])
        return self

    def about(self, origin: Tensor) -> Self:
        """Return the statistics of the same rows about another origin `[d]`.

        Raises:
            ValueError: if the origin does not fit.
        """
        result = self.copy()
        result.origin = _checked_origin(origin, self.num_features).to(self.origin.device)
        shift = result.origin - self.origin
        half = self.total - self.rows / 2 * shift
        result.upper -= torch.outer(shift, half)
        result.upper -= torch.outer(half, shift)
        result.upper.diagonal().clamp_(min=0)
        result.sums -= self.counts.to(torch.float64)[:, None] * shift
        result.total -= self.rows * shift
        return result

    def is_close(self, other: Self, tolerance: float = 1e-9) -> bool:
        """Say whether both describe the same rows, to rounding.

        Args:
            other: the statistics to compare with.
            tolerance: by how much the Gram matrix may differ, as a share of the features' root sums of
                squares `r` (entry `i, j` by `tolerance * r_i * r_j`), and the sums likewise.
        """
        if self.sums.shape != other.sums.shape or self.multi_label != other.multi_label:
            return False
        if self.rows != other.rows or not torch.equal(self.counts, other.counts):
            return False
        if not torch.equal(self.origin, other.origin):
            return False
        root = torch.maximum(self.upper.diagonal(), other.upper.diagonal()).sqrt()
        sums = tolerance * self.rows**0.5 * root
        return (
            bool(((self.upper - other.upper).triu().abs() <= tolerance * torch.outer(root, root)).all())
            and bool(((self.sums - other.sums).abs() <= sums).all())
            and bool(((self.total - other.total).abs() <= sums).all())
        )

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
        """Return `[d]`, the diagonal of a scatter below which a feature is constant to rounding.

        A constant feature's rounding errors do not average out: measured, a tenth of `N` units of the last
        place of its sum of squares.
        """
        unit = torch.finfo(torch.float64).eps
        return 2 * unit * (self.rows + 16) * self.upper.diagonal()

    def mean(self) -> Tensor:
        """Return `[d]`, the mean of all rows.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        return self.origin + self.total / self.rows

    def scale(self) -> Tensor:
        """Return `[d]`, the standard deviations over all rows, with 1 for features that do not vary.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        scatter = self.upper.diagonal() - self.total.square() / self.rows
        varies = scatter > self.negligible_scatter()
        return torch.where(varies, scatter, self.rows).div(self.rows).sqrt()

    def _require_rows(self) -> None:
        if self.rows == 0:
            raise UserError("There are no rows: every site was empty, or withheld what it has.")

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by name, on the CPU, for the wire; the Gram matrix as `[d (d + 1) / 2]`.

        The packed Gram matrix is its upper triangle row by row.
        """
        packed = torch.cat([row[start:] for start, row in enumerate(self.upper)])
        tensors = {
            "counts": self.counts,
            "gram": packed,
            "multi_label": torch.tensor([self.multi_label]),
            "origin": self.origin,
            "rows": torch.tensor([self.rows]),
            "sums": self.sums,
            "total": self.total,
        }
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Undo `to_tensors`, trusting nothing.

        Raises:
            ValueError: if a name, number type or shape differs, a value is not finite, or the sums cannot be
                those of any rows (a negative count, a class without rows but with a sum, a sum larger than
                the sum of squares allows).
        """
        _check_names(tensors)
        d, classes = len(tensors["origin"]), len(tensors["counts"])
        if d == 0 or classes == 0:
            raise ValueError("Statistics need at least one feature and one class.")
        shapes = {
            "gram": (d * (d + 1) // 2,),
            "multi_label": (1,),
            "rows": (1,),
            "sums": (classes, d),
            "total": (d,),
        }
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"Statistics of {d} features and {classes} classes need {name!r} as {list(shape)}, "
                    f"not {list(tensors[name].shape)}."
                )
        packed = tensors["gram"]
        upper = torch.zeros(d, d, dtype=torch.float64, device=packed.device)
        upper.masked_scatter_(_upper_mask(d, packed.device), packed)
        stats = cls(
            origin=tensors["origin"].clone(),
            rows=int(tensors["rows"]),
            counts=tensors["counts"].clone(),
            sums=tensors["sums"].clone(),
            total=tensors["total"].clone(),
            upper=upper,
            multi_label=bool(tensors["multi_label"]),
        )
        stats._check_consistency()
        return stats

    def _check_consistency(self) -> None:
        counts, diagonal = self.counts, self.upper.diagonal()
        if self.rows < 0 or bool((counts < 0).any()):
            raise ValueError("Statistics cannot have a negative number of rows.")
        if self.rows > _MOST_ROWS:
            raise ValueError(f"No site has {self.rows} rows.")
        if bool((counts > self.rows).any()):
            raise ValueError(f"A class has more rows than the {self.rows} there are.")
        if not self.multi_label and int(counts.sum()) != self.rows:
            raise ValueError(f"The classes have {int(counts.sum())} rows, but there are {self.rows}.")
        if bool((diagonal < 0).any()):
            raise ValueError("A feature's sum of squares is negative.")
        if bool((self.sums[counts == 0] != 0).any()):
            raise ValueError("A class without rows has a sum that is not zero.")
        # Cauchy and Schwarz: no sum of n values exceeds the root of n times their sum of squares.
        root = diagonal.sqrt()
        slack = _CONSISTENCY * root.max()
        largest = root + slack
        numbers = counts.to(torch.float64).sqrt()
        if bool((self.total.abs() > self.rows**0.5 * largest).any()) or bool(
            (self.sums.abs() > numbers[:, None] * largest).any()
        ):
            raise ValueError("A sum of features is larger than their sum of squares allows.")
        if bool((self.upper.abs() > torch.outer(largest, largest)).any()):
            raise ValueError("The Gram matrix cannot be one: an entry exceeds what its diagonal allows.")
        if not self.multi_label:
            difference = (self.sums.sum(0) - self.total).abs()
            if bool((difference > self.rows**0.5 * slack).any()):
                raise ValueError("The classes' sums do not add up to the sum of all rows.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the whole of it is there, or what was before.

        Raises:
            UserError: if it may not be written.
            FedheadError: if the disk is full.
        """
        tensors = self.to_tensors()
        write_atomically(Path(path), save(tensors, {"format": _FORMAT, "sha256": _digest(tensors)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; the same statistics, bit for bit.

        Raises:
            UserError: if the file is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no feature statistics that this version reads.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"There are no feature statistics at {path}.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"The feature statistics at {path} cannot be read: {error}.") from error
        if metadata.get("sha256") != _digest(tensors):
            raise UserError(f"The feature statistics at {path} are damaged: their digest differs.")
        try:
            return cls.from_tensors(tensors)
        except ValueError as error:
            raise UserError(f"The feature statistics at {path} are damaged: {error}") from error


class RandomProjection:
    """Wide features `[n, D]` to narrow ones `[n, d]`, `x P`, by random signs (Achlioptas, JCSS 2003).

    The entries of `P` `[D, d]` are `1/sqrt(d)` or its negative with equal chance, so inner products are kept
    up to a relative deviation of about `sqrt(2/d)`. `P` is a function of its shape and the seed alone: it is
    the same in every process, on every machine. It is made a block of rows at a time and never held whole.

    Args:
        wide: `D`.
        narrow: `d`.
        seed: at least 0.
    """

    _ROWS = 1024

    def __init__(self, wide: int, narrow: int, seed: int) -> None:
        if not 0 < narrow < wide:
            raise ValueError(f"Cannot project {wide} features to {narrow}.")
        self.wide = wide
        self.narrow = narrow
        self.seed = seed

    def __call__(self, features: Tensor) -> Tensor:
        """Return `[n, d]`, float64, of features `[n, D]`.

        Raises:
            ValueError: if the width differs.
        """
        if features.ndim != 2 or features.shape[1] != self.wide:
            raise ValueError(f"Features must be [n, {self.wide}], not {list(features.shape)}.")
        narrow = torch.zeros(len(features), self.narrow, dtype=torch.float64, device=features.device)
        for rows, signs in self._blocks():
            narrow.addmm_(features[:, rows].to(torch.float64), signs.to(features.device))
        return narrow.mul_(self.narrow**-0.5)

    @torch.no_grad()
    def widen(self, head: LinearHead) -> LinearHead:
        """Return the head on wide features that equals `head` on their projection: weight `W P^T`.

        Raises:
            ValueError: if the head is not one on `d` features.
        """
        if head.num_features != self.narrow:
            raise ValueError(f"The head takes {head.num_features} features, not {self.narrow}.")
        weight = head.weight.to(torch.float64) * self.narrow**-0.5
        wide = torch.cat([weight @ signs.T.to(weight.device) for _, signs in self._blocks()], dim=1)
        return LinearHead.from_weights(wide.to(head.weight.dtype), head.bias)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for number, start in enumerate(range(0, self.wide, self._ROWS)):
            rows = min(self._ROWS, self.wide - start)
            values = rows * self.narrow
            # The raw words of a counter-based generator, which NumPy keeps as they are, and not its normal
            # deviates, which it may change.
            words = numpy.random.Philox(key=[self.seed, number]).random_raw(-(-values // 64))
            bits = numpy.unpackbits(words.astype("<u8").view(numpy.uint8), count=values)
            signs = torch.from_numpy(bits).to(torch.float64).mul_(2).sub_(1)
            yield slice(start, start + rows), signs.reshape(rows, self.narrow)


def projection_for(num_features: int, seed: int, limit: int = MAX_WIDTH) -> RandomProjection | None:
    """Return the projection to `limit` features that wider ones need before statistics, or None."""
    return RandomProjection(num_features, limit, seed) if num_features > limit else None


def origin_of(probe: Tensor, seed: int) -> Tensor:
    """Return the origin of a run's statistics: the mean of its probe's features `[PROBES, d]`.

    For features wide enough to be projected it is zeros: a projected origin might differ in its last bits between
    machines, and sums about different origins do not add.
    """
    project = projection_for(probe.shape[1], seed)
    return probe.mean(0) if project is None else torch.zeros(project.narrow)


def _checked_origin(origin: Tensor, num_features: int) -> Tensor:
    if origin.shape != (num_features,) or not bool(origin.isfinite().all()):
        raise ValueError(f"The origin must be {num_features} finite numbers.")
    return origin.detach().to(torch.float64).clone()


def _upper_mask(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu_()


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    if tensors.keys() != _TENSORS.keys():
        raise ValueError(f"Statistics consist of {sorted(_TENSORS)}, not {sorted(tensors)}.")
    for name, (dtype, ndim) in _TENSORS.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.ndim != ndim:
            raise ValueError(
                f"Statistics need {name!r} with {ndim} dimensions of {dtype}, not {tensor.ndim} of {tensor.dtype}."
            )
        if dtype == torch.float64 and not bool((tensor.abs() <= _LARGEST).all()):
            raise ValueError(f"In the statistics, {name!r} has a value that is not finite, or beyond {_LARGEST}.")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
