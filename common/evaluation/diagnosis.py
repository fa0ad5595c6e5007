"""Diagnosis of each site: how it compares with the pool and a recommendation, from a shift and compared heads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fedhead.evaluation.comparison import Comparison
from fedhead.evaluation.personal import PersonalHeads
from fedhead.evaluation.shift import MIN_CLASS_ROWS, MIN_CONTRAST, MIN_DISTANCE, Shift

WORTHWHILE = 0.1
"""Smallest difference in accuracy that matters: ten points."""

Recommendation = Literal["join", "join with a local head", "stay local", "not enough rows to tell"]
Finding = Literal["alike", "images look different", "classes look exchanged", "labels look wrong", "unknown"]

_HEAD_LEVEL = 0.05


@dataclass(frozen=True)
class SiteDiagnosis:
    """Comparison of a site with the pool, and a recommendation.

    Attributes:
        site: the name of the site.
        recommendation: the recommended action.
        finding: how the site's rows compare with the other sites'.
        reason: the reason, in words.
        rows: the number of training rows.
        classes: the number of classes among them.
        shift: the shift of the site's rows; None if nothing could be compared.
        comparison: the heads' results on the site's held-out rows; None if there are none.
    """

    site: str
    recommendation: Recommendation
    finding: Finding
    reason: str
    rows: int
    classes: int
    shift: Shift | None
    comparison: Comparison | None

    @property
    def sentence(self) -> str:
        """Recommendation and reason, for the site's engineer."""
        return f"{self.site}: {self.recommendation}. {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the sentence as JSON types."""
        values = asdict(self)
        if self.shift:
            values["shift"]["look_like"] = {str(mine): theirs for mine, theirs in self.shift.look_like.items()}
        if self.comparison:
            values["comparison"]["accuracies"] = self.comparison.accuracies
        return {**values, "sentence": self.sentence}


def diagnose(
    site: str, shift: Shift | None, comparison: Comparison | None, counts: Tensor, classes: Sequence[str]
) -> SiteDiagnosis:
    """Compare a site with the pool and recommend an action.

    A site with shifted rows should stay local, unless the pooled head is significantly better than its own (McNemar's
    test at 5 %) or the others' head does no harm. A site without a shift is recommended a local head beside the
    shared one only if its own head is significantly better. If neither head is better, a recommendation needs enough
    rows to rule out a difference of `WORTHWHILE`.

    Args:
        site: the name of the site.
        shift: the result of `shift` or `shifts`.
        comparison: the result of `compare`.
        counts: `[C]`, the site's training rows of each class.
        classes: `C` names.
    """
    finding = _finding(shift, comparison, counts)
    recommendation = _recommendation(finding, comparison, counts)
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


def delivered(diagnosis: SiteDiagnosis, personal: PersonalHeads | None) -> SiteDiagnosis:
    """Return a diagnosis that says what the site's personal head delivers; unchanged without one.

    A site that should join with a local head, or is better off alone, then has a head that joins both.
    """
    found = personal.sites.get(diagnosis.site) if personal is not None else None
    if found is None:
        return diagnosis
    said = f" Its personal head, which it keeps, classifies {found.right['personal']} of {found.rows} correctly."
    return replace(diagnosis, reason=diagnosis.reason + said)


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


def _recommendation(finding: Finding, comparison: Comparison | None, counts: Tensor) -> Recommendation:
    unlike = finding not in ("alike", "unknown")
    if comparison is None or finding == "labels look wrong":
        return "stay local" if unlike else "not enough rows to tell"
    differ = comparison.p_value < _HEAD_LEVEL
    worse = differ and comparison.right["own"] < comparison.right["pooled"]
    harmless = comparison.gain_over_others[1] < WORTHWHILE and _has_skill(comparison, "others", counts)
    if unlike:
        return "join" if harmless or (worse and _has_skill(comparison, "pooled", counts)) else "stay local"
    if differ and not worse and int((counts > 0).sum()) > 1:
        return "join with a local head"
    return "join" if worse or comparison.gain[1] < WORTHWHILE else "not enough rows to tell"


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
    return tally + _conclusion(finding, recommendation, comparison, counts)


def _conclusion(finding: Finding, recommendation: Recommendation, comparison: Comparison, counts: Tensor) -> str:
    most = f"{max(comparison.gain[1], 0.0):.0%}"
    if recommendation == "stay local":
        return "."
    if recommendation == "not enough rows to tell":
        return f"; its own head might still be up to {most} better."
    if recommendation == "join with a local head":
        return f"; it needs a head of its own beside the shared one (p = {comparison.p_value:.2g})."
    if comparison.p_value < _HEAD_LEVEL and comparison.right["own"] < comparison.right["pooled"]:
        return f"; it benefits from the other sites (p = {comparison.p_value:.2g})."
    if finding not in ("alike", "unknown"):
        return "; the difference does no harm."
    if int((counts > 0).sum()) < 2:
        return "; its own head knows only one class and always predicts it."
    return f"; its own head is at most {most} better."
