"""Metrics of tagged sentences from sums: precision, recall and F1 of entities, with 95 % intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fedhead.evaluation.metrics import Estimate, EvaluationReport, as_json, report, wilson_interval
from fedhead.sums.entities import EntitySums

_NONE = "There are no entities, neither true nor predicted ones."


@dataclass(frozen=True)
class TypeReport:
    """Metrics of one type of entities.

    Attributes:
        name: of the type; empty for all types.
        entities: the number of true ones.
        precision: the share of predicted entities that are right in type and both ends.
        recall: the share of true entities that are found.
        f1: the harmonic mean of both.
    """

    name: str
    entities: int
    precision: Estimate
    recall: Estimate
    f1: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        figures = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return {"name": self.name, "entities": self.entities, **as_json(figures)}


@dataclass(frozen=True)
class TaggingReport(EvaluationReport):
    """Metrics of a head on words and entities.

    Attributes:
        overall: metrics of entities of all types together, which are counted alike (micro average).
        types: a report for each type.
    """

    overall: TypeReport
    types: tuple[TypeReport, ...]

    @property
    def score(self) -> Estimate:
        """F1 of entities."""
        return self.overall.f1

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        overall = self.overall.to_dict()
        undefined = {**overall.pop("undefined", {}), **super().to_dict().get("undefined", {})}
        del overall["name"]
        return {
            **super().to_dict(),
            **overall,
            **({"undefined": undefined} if undefined else {}),
            "types": [one.to_dict() for one in self.types],
        }


def tagging_report(sums: EntitySums, tags: Sequence[str], types: Sequence[str]) -> TaggingReport:
    """Compute metrics with intervals, which assume independent entities."""
    plain = report(sums, tags)
    values = {one.name: getattr(plain, one.name) for one in fields(EvaluationReport)}
    by_type = tuple(_of_type(name, *counts) for name, counts in zip(types, sums.entities.tolist(), strict=True))
    return TaggingReport(**values, overall=_of_type("", *sums.entities.sum(0).tolist()), types=by_type)


def _of_type(name: str, found: int, wrong: int, missed: int) -> TypeReport:
    return TypeReport(
        name,
        found + missed,
        _share(found, found + wrong, "No entity is predicted."),
        _share(found, found + missed, "There are no entities."),
        f1(found, wrong, missed),
    )


def f1(found: int, wrong: int, missed: int) -> Estimate:
    """Return `2 J / (1 + J)`, where `J` is the share found of all true or predicted entities, with Wilson's limits."""
    share = _share(found, found + wrong + missed, _NONE)
    if share.value is None or share.low is None or share.high is None:
        return share
    value, low, high = (2 * one / (1 + one) for one in (share.value, share.low, share.high))
    return Estimate(value, low, high)


def _share(right: int, count: int, reason: str) -> Estimate:
    if not count:
        return Estimate.undefined(reason)
    low, high = wilson_interval(np.array(right), np.array(count))
    return Estimate(right / count, float(low), float(high))
