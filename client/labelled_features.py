"""The features and targets that sites share, and the rows of each site among them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.heads import FeatureMap
from fedhead.tasks import Targets, Task
from fedhead.tasks.dense import ItemPlaces
from fedhead.tasks.losses import CrossEntropy, Loss

IntArray = npt.NDArray[np.int64]


GRAM_BYTES = 512 * 2**20
"""Memory for results cached between rounds, in addition to the features."""

KEPT_COHORTS = 2
"""Those that train, and those that evaluate."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features `[N, d]` and labels on any device, possibly memory-mapped; shared by all sites.

    Attributes:
        features: `[N, d]`.
        labels: the targets `[N]` or `[N, C]`, in the form that `loss` expects.
        standardisation: a mean and a scale `[D]`; heads see `(x - mean) / scale`.
        loss: of outputs against targets.
        target_standardisation: the same for the targets, `[C]` each; heads are trained on `(y - mean) / scale`.
        mapping: of features `[..., d]` to `[..., D]`, before all else; None for plain features.
        places: how items become the places that are learned from; None if rows are items.
        grams: cached products of the features.
        cohorts: cached sites of a request.
    """

    features: Tensor
    labels: Tensor
    standardisation: tuple[Tensor, Tensor] | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    target_standardisation: tuple[Tensor, Tensor] | None = None
    mapping: FeatureMap | None = None
    places: ItemPlaces | None = None
    grams: "GramCache" = field(default_factory=lambda: GramCache(), compare=False, repr=False)
    cohorts: "CohortCache" = field(default_factory=lambda: CohortCache(), compare=False, repr=False)

    @classmethod
    def of(
        cls, features: Tensor, targets: Targets, task: Task, device: torch.device, places: ItemPlaces | None = None
    ) -> Self:
        """Return features and the targets of a task on a device."""
        return cls(features.to(device), torch.from_numpy(targets).to(device), loss=task.loss, places=places)

    @property
    def width(self) -> int:
        """`D`."""
        return self.features.shape[1] if self.mapping is None else self.mapping.width

    def mapped(self, features: Tensor) -> Tensor:
        """Return the mapped features `[..., D]` of plain ones `[..., d]`."""
        return features if self.mapping is None else self.mapping(features)

    def exact(self, rows: Tensor) -> Tensor:
        """Return the mapped features `[n, D]` of `rows` `[n]` on the CPU, computed in float64 if there is a map."""
        features = self.features[rows.to(self.features.device)].cpu()
        return features if self.mapping is None else self.mapping(features.double())

    def blocks_of(self, rows: IntArray, size: int = 2048) -> Iterator[Tensor]:
        """Yield what `exact` returns, block by block; of items with places, the features of these `[p, d]`."""
        if self.places is None:
            yield from map(self.exact, torch.split(torch.from_numpy(rows), size))
            return
        for values, _ in self.places.blocks(self.features, rows):
            yield self.places.geometry.places(values).flatten(0, 1)

    def gather(self, rows: IntArray, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features `[..., D]` and targets `[...]` or `[..., C]` of `rows` `[...]`, standardised.

        Features have the device and dtype of `like`, and so do real targets; labels have its device.
        """
        index = torch.from_numpy(rows.ravel())
        features = self.mapped(self.features.index_select(0, index.to(self.features.device)).to(like))
        labels = self.targets(index, like)
        if self.standardisation is not None:
            mean, scale = self.standardisation
            features.sub_(mean.to(like)).div_(scale.to(like))
        return features.view(*rows.shape, -1), labels.view(*rows.shape, *labels.shape[1:])

    def loss_at(self, sites: Sequence["SiteRows"]) -> Loss:
        """Return the loss that heads are trained by at some sites."""
        return self.loss

    def targets(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the targets `[n]` or `[n, C]` of `rows` `[n]`, standardised, on the device of `like`."""
        targets = self.labels.index_select(0, rows.to(self.labels.device))
        if self.target_standardisation is None:
            return targets.to(like.device)
        mean, scale = (part.to(targets) for part in self.target_standardisation)
        return targets.sub(mean).div_(scale).to(like)


class GramCache:
    """Cached products of sites' rows with each other, valid while the same sites are trained together.

    Args:
        max_bytes: the size limit; the oldest products are evicted.
    """

    def __init__(self, max_bytes: int = GRAM_BYTES) -> None:
        self.max_bytes = max_bytes
        self._standardisation: tuple[Tensor, Tensor] | None = None
        # The sites are stored with the products so that their ids are not reused.
        self._kept: dict[tuple[int, ...], tuple[Sequence[SiteRows], Tensor]] = {}

    def under(self, standardisation: tuple[Tensor, Tensor] | None) -> None:
        """Discard products computed under another standardisation."""
        before = self._standardisation
        same = before is standardisation or (
            before is not None and standardisation is not None and all(map(torch.equal, before, standardisation))
        )
        if not same:
            self._kept.clear()
            self._standardisation = standardisation

    def get(self, sites: Sequence["SiteRows"], make: Callable[[Sequence["SiteRows"]], Tensor]) -> Tensor:
        """Return `[k, n, n]` for these sites, from the cache or computed by `make`."""
        key = tuple(map(id, sites))
        if key in self._kept:
            return self._kept[key][1]
        gram = make(sites)
        if gram.nbytes <= self.max_bytes:
            self._kept[key] = (sites, gram)
        while sum(kept.nbytes for _, kept in self._kept.values()) > self.max_bytes:
            self._kept.pop(next(iter(self._kept)))
        return gram


@dataclass(frozen=True)
class SiteRows:
    """A site's name and its rows `[n]` among the shared features."""

    name: str
    rows: IntArray

    @cached_property
    def key(self) -> int:
        """64 bits derived from the name, which seed the site's row orders."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")


class Cohort(Sequence[SiteRows]):
    """Sites of one request, with everything that follows from their names and rows alone, computed once.

    Args:
        sites: in any order.

    Attributes:
        parts: some of the sites, by their places in `by_size`.
    """

    def __init__(self, sites: Sequence[SiteRows]) -> None:
        self._sites = tuple(sites)
        self.parts: dict[tuple[int, int], Cohort] = {}
        self._together: tuple[Cohort, Cohort] | None = None

    @overload
    def __getitem__(self, index: int) -> SiteRows: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SiteRows]: ...
    def __getitem__(self, index: int | slice) -> SiteRows | Sequence[SiteRows]:
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[SiteRows]:
        return iter(self._sites)

    @cached_property
    def sizes(self) -> IntArray:
        """`[S]`, the number of rows of each site."""
        return np.fromiter((len(site.rows) for site in self._sites), np.int64, len(self._sites))

    @cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """`[S]`, the keys of the sites."""
        return np.fromiter((site.key for site in self._sites), np.uint64, len(self._sites))

    @cached_property
    def rows(self) -> IntArray:
        """`[N]`, the rows of all sites, one site after the other."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(site.rows for site in self._sites)])

    @cached_property
    def owners(self) -> IntArray:
        """`[N]`, the place of each row's site."""
        return np.repeat(np.arange(len(self._sites)), self.sizes)

    @cached_property
    def span(self) -> tuple[int, int]:
        """The first of the rows, and the one after the last."""
        return (int(self.rows.min()), int(self.rows.max()) + 1) if len(self.rows) else (0, 0)

    @cached_property
    def distinct(self) -> IntArray:
        """The distinct rows, ascending."""
        return np.unique(self.rows)

    @cached_property
    def by_size(self) -> IntArray:
        """`[S]`, the places of the sites by descending number of rows."""
        return np.argsort(-self.sizes, kind="stable")

    @cached_property
    def table(self) -> IntArray:
        """`[S, n]`, the rows of each site, padded with the site's first row."""
        columns = np.arange(self.sizes.max(initial=0))
        # One row more, for sites without rows.
        rows = np.append(self.rows, 0)
        places = np.where(columns < self.sizes[:, None], columns, 0) + (np.cumsum(self.sizes) - self.sizes)[:, None]
        table: IntArray = rows[places]
        table[self.sizes == 0] = 0
        return table

    def part(self, start: int, stop: int) -> "Cohort":
        """Return some of the sites, by descending number of rows."""
        if (start, stop) not in self.parts:
            self.parts[start, stop] = Cohort([self._sites[place] for place in self.by_size[start:stop].tolist()])
        return self.parts[start, stop]

    def with_others(self, others: "Cohort") -> "Cohort":
        """Return the sites of both as one cohort."""
        if self._together is None or self._together[0] is not others:
            self._together = others, Cohort([*self, *others])
        return self._together[1]


class CohortCache:
    """The latest cohorts, so that the same sites are the same cohort in every round."""

    def __init__(self) -> None:
        # A cohort holds its sites, so that their ids are not reused.
        self._kept: dict[tuple[int, ...], Cohort] = {}

    def of(self, sites: Sequence[SiteRows]) -> Cohort:
        """Return the cohort of some sites."""
        if isinstance(sites, Cohort):
            return sites
        key = tuple(map(id, sites))
        if key not in self._kept:
            self._kept[key] = Cohort(sites)
        while len(self._kept) > KEPT_COHORTS:
            self._kept.pop(next(iter(self._kept)))
        return self._kept[key]


def sizes_of(sites: Sequence[SiteRows]) -> IntArray:
    """Return `[S]`, the number of rows of each site."""
    return sites.sizes if isinstance(sites, Cohort) else Cohort(sites).sizes
