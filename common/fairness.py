"""Group fairness: a model's metrics and calibration in each group of rows, from counts that add across sites."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fedhead.config import LONGEST_SUBGROUP, MOST_SUBGROUPS
from fedhead.data import Samples
from fedhead.data.samples import require_kind
from fedhead.drift import head_digest, read_counts
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore, Progress
from fedhead.files import write_atomically
from fedhead.model import TransferModel
from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.score_bins import ScoreBins
from fedhead.wording import one_line

_FORMAT = "fedhead-groups-1"
_ROWS = 8192


@dataclass(frozen=True, eq=False)
class GroupCounts:
    """Evaluation counts by group; all that `fedhead fairness` writes, and nothing about a single row.

    Attributes:
        model: the digest of the model's head.
        classes: the model's classes.
        groups: the counts of each group, in the default `ScoreBins`.
        withheld: the number of groups with too few rows.
    """

    model: str
    classes: tuple[str, ...]
    groups: Mapping[str, EvaluationSums]
    withheld: int = 0

    def __add__(self, other: Self) -> Self:
        if self.model != other.model or self.classes != other.classes:
            raise UserError("These counts are of different models, so they do not add.")
        groups = dict(self.groups)
        for name, sums in other.groups.items():
            groups[name] = groups[name] + sums if name in groups else sums
        return type(self)(self.model, self.classes, groups, self.withheld + other.withheld)

    def save(self, path: Path) -> None:
        """Write a JSON file.

        Raises:
            UserError: if it cannot be written.
        """
        groups = {
            name: {key: array.tolist() for key, array in sums.to_arrays().items()} for name, sums in self.groups.items()
        }
        values = {
            "format": _FORMAT,
            "model": self.model,
            "classes": list(self.classes),
            "groups": groups,
            "withheld": self.withheld,
        }
        write_atomically(path, json.dumps(values) + "\n")

    @classmethod
    def load(cls, path: Path, model: TransferModel) -> "GroupCounts":
        """Read a file of `save`, validating everything: it may come from another site.

        Args:
            path: of the file.
            model: the counts must be of this one.

        Raises:
            UserError: if it is missing or damaged, or of another model.
        """

        def parse(values: Mapping[str, Any]) -> "GroupCounts":
            if values["model"] != head_digest(model) or tuple(values["classes"]) != model.classes:
                raise UserError(f"The counts in {path} are of another model than the given one.")
            like = EvaluationSums.zeros(len(model.classes), kind=model.task.kind)
            groups = {_checked_name(name): _read(arrays, like) for name, arrays in dict(values["groups"]).items()}
            withheld = values["withheld"]
            if not all(sums.rows for sums in groups.values()) or not groups:
                raise ValueError("it has no groups, or one without rows")
            if len(groups) > MOST_SUBGROUPS or not isinstance(withheld, int) or not 0 <= withheld <= 2**31:
                raise ValueError("it has too many groups, or a wrong number of withheld ones")
            return cls(values["model"], model.classes, groups, withheld)

        return read_counts(path, _FORMAT, parse)


def count_groups(
    model: TransferModel,
    samples: Samples,
    *,
    min_class_count: int = 5,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> GroupCounts:
    """Evaluate a model in each group of labelled rows at a site.

    Args:
        model: a classifier.
        samples: labelled rows with subgroups, as from a data spec with `group_by=COLUMN`, or else with groups; those
            without one are left out.
        min_class_count: groups with fewer rows, or patients where the data names these beside subgroups, are withheld.
            The counts have no total, so nothing can be subtracted.
        strict: whether to stop at unreadable rows.
        progress: called with the number of rows done and of all.

    Raises:
        UserError: if the model is no classifier, or the data has no groups or too many.
        FedheadError: if all groups are withheld.
    """
    if model.task.family != "classification":
        raise UserError("Groups are compared for classifiers; this model predicts numbers.")
    if model.task.divides_items:
        raise UserError(f"Groups are compared for classifiers of whole inputs, not for the task {model.task.name!r}.")
    require_kind(model.backbone.spec, model.backbone.kind, samples.kind)
    groups = samples.groups if samples.subgroups is None else samples.subgroups
    if groups is None:
        raise UserError(
            "The data has no groups; name their column in the data spec, as in csv:FILE?label=...&group_by=sex."
        )
    targets = torch.from_numpy(model.task.encode(samples))
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = [row for row in store.readable().tolist() if groups[row] is not None]
    names = sorted({str(groups[row]) for row in rows})
    if len(names) > MOST_SUBGROUPS:
        raise UserError(f"The data has {len(names):,} groups; groups to compare are {MOST_SUBGROUPS} at most.")
    number = {name: place for place, name in enumerate(names)}
    owners = np.array([number[str(groups[row])] for row in rows], np.int64)
    head, index = model.head.to("cpu"), torch.tensor(rows, dtype=torch.int64)
    with torch.inference_mode():
        parts = [head(store.features[block].cpu()).double() for block in torch.split(index, _ROWS)]
    logits = (
        torch.cat([torch.empty(0, len(model.classes), dtype=torch.float64), *parts]) / model.calibration.temperature
    )
    if len(logits):
        logits = logits.where(~model.unlearned_mask, logits.min() - 50)
    counted = model.task.count(
        logits, targets[index], owners, max(len(names), 1), ScoreBins.default(len(model.classes))
    )
    found = dict(zip(names, counted, strict=False))
    people = store.keys[rows] if samples.subgroups is not None else np.arange(len(rows))
    pairs = np.unique(np.stack([owners.astype(np.uint64), people.astype(np.uint64)]), axis=1)
    sizes = dict(zip(names, np.bincount(pairs[0].astype(np.int64), minlength=len(names)).tolist(), strict=True))
    kept = {_checked_name(name): sums for name, sums in found.items() if sizes[name] >= max(min_class_count, 1)}
    if not kept:
        raise FedheadError(f"Nothing is counted: no group has {max(min_class_count, 1)} rows or more.")
    return GroupCounts(head_digest(model), model.classes, kept, len(found) - len(kept))


def _checked_name(name: str) -> str:
    if not name or one_line(name, LONGEST_SUBGROUP) != name:
        raise UserError(f"A group's name is empty, too long or holds control characters: {one_line(name, 40)!r}.")
    return name


def _read(arrays: Mapping[str, Any], like: EvaluationSums) -> EvaluationSums:
    types = {name: array.dtype for name, array in like.to_arrays().items()}
    made = {}
    for name, values in dict(arrays).items():
        if types.get(name, np.dtype(np.float64)).kind == "f":
            made[name] = np.array(values, np.float64)
        else:
            whole = np.array(values)
            if whole.dtype.kind not in "iu" or (whole < 0).any() or (whole >= 2**32).any():
                raise ValueError(f"{name!r} does not hold counts")
            made[name] = whole.astype(np.uint32)
    return EvaluationSums.from_arrays(made, like)
