"""Holdings of sites: their rows as features under a run's backbone, split into training and held-out rows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from fedhead.client.isolation import Features
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.client.own_adapters import OwnAdapters
from fedhead.client.release.guard import Guard, GuardedRows
from fedhead.client.release.masking import Asked
from fedhead.client.release.row_sets import HELD_OUT_ROWS, TRAINING_ROWS, keys_of
from fedhead.client.release.secure_sessions import SecureSessions
from fedhead.client.release.subgroups import Subgroups, countable
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.data import BoolArray, IntArray, KeyArray, calibration_half
from fedhead.errors import FedheadError
from fedhead.heads import FeatureMap, Head
from fedhead.protocol.messages import Manifest, WeightsChunk
from fedhead.protocol.steps import Masking, Step
from fedhead.tasks import Targets, Task

if TYPE_CHECKING:
    from fedhead.client.tails import Tuning

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holding:
    """A site's rows after its guard, ready for training.

    Attributes:
        data: features and labels, perhaps of more rows than the site's.
        train: the rows to train on and to sum.
        held_out: the rows to evaluate on.
        summable: those of `held_out` that may be summed.
        guarded: the rows that the guard allowed and withheld.
        keys: of all rows of `data`, by which they are held out.
        contents: of all rows of `data`, by which the ledger knows them.
        task: names the groups that sums distinguish.
        share: of the rows that are held out.
        min_class_count: the guard's least number of rows behind a sum.
        people: of all rows of `data`, see `people_of`.
        subgroups: of all rows of `data`; None if the data names none.
        by_subgroup: those of `held_out` that may be counted by subgroup.
    """

    data: LabelledFeatures
    train: SiteRows
    held_out: SiteRows
    summable: SiteRows
    guarded: GuardedRows
    keys: KeyArray
    contents: KeyArray
    task: Task
    share: float | None = None
    min_class_count: int = 0
    people: IntArray | None = None
    subgroups: Subgroups | None = None
    by_subgroup: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def keys_by_group(self) -> Mapping[str, KeyArray]:
        """The keys of the rows that releases rest on, by part and group."""
        targets = self.data.labels.cpu().numpy()
        parts = ((TRAINING_ROWS, self.train.rows), (HELD_OUT_ROWS, self.held_out.rows))
        return {
            name: keys
            for what, rows in parts
            for name, keys in keys_of(what, rows, self.contents, targets, self.task).items()
        }


def hold(
    name: str,
    rows: IntArray,
    out: BoolArray,
    data: LabelledFeatures,
    targets: Targets,
    keys: KeyArray,
    task: Task,
    guard: Guard,
    share: float | None = None,
    contents: KeyArray | None = None,
    people: IntArray | None = None,
    labels: Targets | None = None,
    subgroups: Subgroups | None = None,
    by_subgroup: BoolArray | None = None,
) -> Holding:
    """Let the guard withhold the rows that must not be computed on.

    Args:
        name: of the site.
        rows: `[n]`, its rows of `data`.
        out: `[n]`, which of them are held out.
        data: features and labels.
        targets: `[N, ...]`, the same targets in memory.
        keys: `[N]`, what rows are held out by.
        task: names the groups that the guard counts.
        guard: the site's own.
        share: of rows that are held out.
        contents: `[N]`, the identities of rows in the ledger; by default `keys`.
        people: `[N]`, see `people_of`.
        labels: `[N]` or `[N, C]`, the site's own labels, whatever the run's task; None for rows with real targets.
        subgroups: of the rows of `data`; None if the data names none.
        by_subgroup: `[n]`, which rows may be counted by subgroup; by default as many as fit in one release.
    """
    guarded = guard.allowed_rows(rows, targets[rows], out, task, None if people is None else people[rows])
    held = guarded.held_out
    people_held = None if people is None else people[held]
    divided = np.empty(0, np.int64)
    if subgroups is not None and by_subgroup is not None:
        divided = held[np.isin(held, rows[by_subgroup]) & (subgroups.numbers[held] >= 0)]
    elif subgroups is not None:
        halves = calibration_half(keys[held])
        divided = held[countable(guard, subgroups.numbers[held], halves, people_held)]
    summable = guard.summable(held, targets[held], task, people_held, None if labels is None else labels[held])
    return Holding(
        data=data,
        train=SiteRows(name, guarded.train),
        held_out=SiteRows(name, guarded.held_out),
        summable=SiteRows(name, summable),
        guarded=guarded,
        keys=keys,
        contents=keys if contents is None else contents,
        task=task,
        share=share,
        min_class_count=guard.min_class_count,
        people=people,
        subgroups=subgroups,
        by_subgroup=divided,
    )


class OpenSite(Protocol):
    """A site whose rows can be computed on."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def steps(self) -> Sequence[Step]:
        """What everything that leaves the site passes, in this order."""

    def open(self, manifest: Manifest) -> Holding:
        """Return the site's rows that the guard allows, after extracting features if that was not done yet.

        Raises:
            FedheadError: if the data cannot be read.
        """


class Site(OpenSite, Protocol):
    """One site, as the `ClientApp` sees it; it decides its own data, device and limits."""

    num_rows: int

    @property
    def training(self) -> TrainingLimits:
        """The site's bounds on how heads are trained."""

    def has_weights(self, manifest: Manifest) -> bool:
        """Return whether the backbone's weights are here."""

    def install(self, manifest: Manifest, chunk: WeightsChunk) -> int | None:
        """Take in a part of the backbone's weights; verify and keep them once they are complete.

        Returns:
            How many bytes are here, in order, if some are missing; None if not.

        Raises:
            FedheadError: if they differ from the manifest.
        """

    def check_data(self, manifest: Manifest) -> None:
        """Check that the site's data fits the run: images or texts, of its classes, and enough of them.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on; nothing was sent to it by then.
        """

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        """Check that the backbone gives the same features of the probe here.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on.
        """

    @property
    def own_adapters(self) -> OwnAdapters:
        """The adapters that stay at the site."""

    def keep_head(
        self,
        manifest: Manifest,
        head: Head,
        temperature: float,
        about: str,
        tail: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep the site's personal head, for features as they are, as a model on this machine.

        Args:
            manifest: of the run.
            head: the head.
            temperature: the divisor of its outputs.
            about: how it was made.
            tail: the tail's parameters that belong to it; None for a head on the frozen backbone.

        Raises:
            FedheadError: if it cannot be written.
        """

    def tuning(self, manifest: Manifest) -> "Tuning":
        """Return the run's tail and the activations of the site's rows, extracted first if that was not done yet.

        Raises:
            FedheadError: if the backbone cannot be cut so, or the site does not train so many parameters.
        """

    def check_tail(self, manifest: Manifest, features: Features) -> None:
        """Check that sums of the features of a tail that a coordinator chose do not show single rows.

        Args:
            manifest: of the run.
            features: of the tail.

        Raises:
            FedheadError: if they do.
        """

    @property
    def sessions(self) -> SecureSessions:
        """The site's secure sums.

        Raises:
            FedheadError: if it takes no part in any.
        """

    def masking(self, asked: Asked) -> Masking:
        """Return how the site masks its sums for the session of a request.

        Raises:
            FedheadError: if it does not take part in the session.
        """

    def check_map(self, manifest: Manifest, mapping: FeatureMap | None) -> None:
        """Check that the site's own rules allow sums of its features under a map.

        Raises:
            FedheadError: why not, in words that the site's engineer can act on.
        """


def refuse_if_withheld(guarded: GuardedRows) -> None:
    """Check that the guard does not withhold a site as a whole.

    Raises:
        FedheadError: if it does.
    """
    if guarded.refusal:
        raise FedheadError(guarded.refusal)
