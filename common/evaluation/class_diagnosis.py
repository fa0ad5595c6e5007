"""Diagnosis of sites whose rows have one class each: from a shift class by class, and compared heads."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedhead.evaluation.comparison import Comparison, compare, heads_to_compare
from fedhead.evaluation.diagnosis import Diagnostics, Finding, Recommendation, SiteDiagnosis, conclusion, recommend
from fedhead.evaluation.shift import MIN_CLASS_ROWS, MIN_CONTRAST, MIN_DISTANCE, Shift, shifts
from fedhead.heads import LinearHead
from fedhead.sums.comparison import ComparisonSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Sums
from fedhead.wording import counted


class ClassDiagnostics(Diagnostics):
    """Compares sites class by class.

    Args:
        sites: training sums by name, read several times but never kept.
        pool: the sum of all of them.
        classes: the names of the classes.
    """

    def __init__(self, sites: Mapping[str, FeatureStatistics], pool: FeatureStatistics, classes: Sequence[str]) -> None:
        self.nothing = ComparisonSums.zeros()
        self._pool = pool
        self._classes = classes
        self._shifts = shifts(sites, pool)

    def heads(self, stats: FeatureStatistics) -> dict[str, LinearHead]:
        return heads_to_compare(stats, self._pool - stats)

    def diagnose(self, site: str, stats: FeatureStatistics, sums: Sums | None) -> SiteDiagnosis:
        comparison = compare(torch.from_numpy(sums.joint)) if isinstance(sums, ComparisonSums) else None
        return diagnose(site, self._shifts[site], comparison, stats.counts, self._classes)


def diagnose(
    site: str, shift: Shift | None, comparison: Comparison | None, counts: Tensor, classes: Sequence[str]
) -> SiteDiagnosis:
    """Compare a site with the pool and recommend an action; see `fedhead.evaluation.diagnosis.recommend`.

    Args:
        site: the name of the site.
        shift: the result of `shift` or `shifts`.
        comparison: the result of `compare`.
        counts: `[C]`, the site's training rows of each class.
        classes: `C` names.
    """
    finding = _finding(shift, comparison, counts)
    recommendation = recommend(
        unlike=finding not in ("alike", "unknown"),
        spoilt=finding == "labels look wrong",
        comparison=comparison,
        skilled=lambda head: _has_skill(comparison, head, counts),
        can_stand_alone=int((counts > 0).sum()) > 1,
    )
    on_heads = _on_heads(finding, recommendation, comparison, counts)
    return SiteDiagnosis(
        site=site,
        recommendation=recommendation,
        finding=finding,
        reason=f"{_on_rows(finding, shift, classes)} {on_heads}",
        rows=int(counts.sum()),
        classes=int((counts > 0).sum()),
        shift=shift,
        comparison=comparison,
    )


def _finding(shift: Shift | None, comparison: Comparison | None, counts: Tensor) -> Finding:
    if shift is None:
        return "unknown"
    if not shift.shifted and not shift.inseparable:
        return "alike" if shift.alike else "unknown"
    skilled = any(_has_skill(comparison, name, counts) for name in ("own", "others"))
    if shift.contrast is not None and shift.contrast < MIN_CONTRAST and not skilled:
        return "labels look wrong"
    far = sum(distance >= MIN_DISTANCE for distance in shift.distances)
    taken = len(set(shift.look_like.values()))
    exchanged = 2 * taken > far and taken >= min(2, len(shift.classes))
    return "classes look exchanged" if exchanged else "images look different"


def _has_skill(comparison: Comparison | None, head: str, counts: Tensor) -> bool:
    """Return whether a head is correct on half of the rows that the site's commonest class gets wrong."""
    if comparison is None:
        return False
    guessed = float(counts.max() / counts.sum().clamp(min=1))
    return comparison.accuracies[head] > (1 + guessed) / 2


def _on_rows(finding: Finding, shift: Shift | None, classes: Sequence[str]) -> str:
    """Describe how a site's rows compare with the others'."""
    if shift is None:
        return (
            "Its rows cannot be compared: either this site and the others have no class in common with "
            f"{MIN_CLASS_ROWS} rows each, or the features do not separate the classes."
        )
    distance = f"by {shift.distance:.2f} of the distance between two classes; {MIN_DISTANCE} or more matters"
    if finding == "alike":
        return f"Its rows look like the other sites' rows of the same classes (they differ {distance})."
    if finding == "unknown":
        return f"Its rows differ from the other sites' rows of the same classes ({distance}), perhaps by chance."
    if finding == "classes look exchanged":
        pairs = (f"those labelled {classes[mine]!r} like {classes[its]!r}" for mine, its in shift.look_like.items())
        return f"Its rows look like the other sites' rows of other classes: {', '.join(pairs)}. Check its class names."
    if finding == "labels look wrong":
        return (
            f"Its labels look wrong: rows with different labels look alike (their distance is {shift.contrast:.2f} of "
            "that at other sites). Check that images and labels belong together."
        )
    most = max(zip(shift.distances, shift.classes, strict=True))[1]
    return (
        f"Its rows look unlike the other sites' rows of the same classes (they differ {distance}; most for "
        f"{classes[most]!r}). Check for different equipment, inverted or differently preprocessed images, and labels "
        "with another meaning."
    )


def _on_heads(finding: Finding, recommendation: Recommendation, comparison: Comparison | None, counts: Tensor) -> str:
    """Describe the heads' results on a site's held-out rows, and the conclusion."""
    if comparison is None:
        return "It has no held-out rows for comparing heads."
    rows, right = comparison.rows, comparison.right
    tally = (
        f"Of its {rows} held-out row{'s' * (rows > 1)} the shared head classifies {right['pooled']} correctly, its own "
        f"head {right['own']} and the other sites' head {right['others']}"
    )
    most = counted(round(100 * max(comparison.gain[1], 0.0)), "point")
    return tally + conclusion(
        recommendation,
        comparison,
        unlike=finding not in ("alike", "unknown"),
        can_stand_alone=int((counts > 0).sum()) > 1,
        lonely="knows only one class and always predicts it",
        might=f"be up to {most} better",
        at_most=f"is at most {most} better",
    )
