"""Diagnosis of sites with real targets or several labels per row: a shift given the target, and compared losses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedhead.evaluation.comparison import HEADS
from fedhead.evaluation.diagnosis import Diagnostics, Finding, Recommendation, SiteDiagnosis, conclusion, recommend
from fedhead.evaluation.loss_comparison import (
    MIN_COMPARED,
    LossComparison,
    compare_losses,
    loss_scale,
    ridge_heads,
    t_interval,
)
from fedhead.evaluation.shift import MIN_DISTANCE
from fedhead.evaluation.target_shift import (
    MIN_ROWS,
    MIN_SITES,
    TargetDistribution,
    TargetShift,
    distributions,
    target_shifts,
)
from fedhead.evaluation.worth import ridge_at, ridge_penalty, squared_errors
from fedhead.heads import LinearHead
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.paired import PairedLosses
from fedhead.sums.sums import Sums

FAR_MEAN = 1.0
"""Difference between a target's means at a site and elsewhere, in standard deviations, that is worth a sentence."""

_SPOILT = (
    "labels look wrong",
    "labels look reversed",
    "targets look wrong",
    "targets look rescaled",
    "targets look reversed",
)
_SKILLED = 0.5


class TargetDiagnostics(Diagnostics):
    """Compares sites by the relation of features to targets, and heads by squared error.

    Args:
        sites: training sums by name, read several times but never kept.
        pool: the sum of all of them.
        columns: the names of the targets or labels.
    """

    measures_harm = True

    def __init__(self, sites: Mapping[str, FeatureStatistics], pool: FeatureStatistics, columns: Sequence[str]) -> None:
        self.nothing = PairedLosses.zeros(len(HEADS))
        self._columns = columns
        self._pool = pool
        self._shifts = target_shifts(sites, pool, columns)
        self._penalty = ridge_penalty(pool)
        scale = loss_scale(pool)
        self.scale = scale.numpy().copy()
        self._variances = scale.square()
        errors = squared_errors(pool, *ridge_at(pool, self._penalty))
        self._explained = 1 - float((errors / self._variances).mean()) / pool.rows

    def heads(self, stats: FeatureStatistics) -> dict[str, LinearHead]:
        return ridge_heads(stats, self._pool, self._penalty)

    def diagnose(self, site: str, stats: FeatureStatistics, sums: Sums | None) -> SiteDiagnosis:
        comparison = compare_losses(sums) if isinstance(sums, PairedLosses) else None
        shift = self._shifts[site]
        finding = finding_of(shift, real=stats.kind.real)
        unlike = finding not in ("alike", "unknown")
        recommendation = recommend(
            unlike=unlike,
            spoilt=finding in _SPOILT,
            comparison=comparison,
            skilled=lambda head: self._has_skill(comparison, head, stats),
            can_stand_alone=bool(stats.rows) and bool((stats.target_scatter() > 0).any()),
        )
        noun = "targets" if stats.kind.real else "labels"
        sentences = [
            _on_rows(finding, shift, noun),
            *_on_distribution(distributions(stats, self._pool - stats, self._columns)),
            _on_heads(recommendation, comparison, noun, unlike=unlike),
        ]
        return SiteDiagnosis(
            site=site,
            recommendation=recommendation,
            finding=finding,
            reason=" ".join(sentences),
            rows=stats.rows,
            classes=int((stats.target_scatter() > 0).sum()) if stats.rows else 0,
            shift=shift,
            comparison=comparison,
        )

    def with_harm(self, diagnosis: SiteDiagnosis, elsewhere: Sums) -> SiteDiagnosis:
        """Return a diagnosis that includes the effect of the site's rows on the other sites.

        A site whose rows make the shared head significantly worse at the others is recommended to stay local.
        """
        if not isinstance(elsewhere, PairedLosses) or elsewhere.rows < MIN_COMPARED:
            return diagnosis
        without, pooled = HEADS.index("others"), HEADS.index("pooled")
        low, high = t_interval(*elsewhere.gain(without, over=pooled), elsewhere.rows - 1)
        if low <= 0:
            return diagnosis
        said = (
            f" Its rows make the shared head worse at the other sites: without them it explains {low:.1%} to "
            f"{high:.1%} more of the variance there ({elsewhere.rows} held-out rows)."
        )
        return replace(diagnosis, recommendation="stay local", reason=diagnosis.reason + said)

    def _has_skill(self, comparison: LossComparison | None, head: str, stats: FeatureStatistics) -> bool:
        """Return whether a head explains half as much of the site's own variance as the pooled head of all rows."""
        if comparison is None or not stats.rows:
            return False
        variance = float((stats.target_scatter() / stats.rows / self._variances).mean())
        return comparison.losses[head] < (1 - _SKILLED * max(self._explained, 0.0)) * variance


def finding_of(shift: TargetShift | None, *, real: bool) -> Finding:
    """Return how a site's rows compare with the others', given its shift."""
    if shift is None:
        return "unknown"
    if not shift.unlike:
        return "alike" if shift.alike else "unknown"
    if shift.rescaled and shift.contrast < 0:
        return "targets look reversed" if real else "labels look reversed"
    if shift.rescaled and real:
        return "targets look rescaled"
    if shift.weak:
        return "targets look wrong" if real else "labels look wrong"
    return "rows look different"


def _on_rows(finding: Finding, shift: TargetShift | None, noun: str) -> str:
    """Describe how a site's rows compare with the others'."""
    if shift is None:
        return (
            f"Its rows cannot be compared: this needs {MIN_ROWS} training rows here and at {MIN_SITES - 1} other "
            f"sites, and features that predict the {noun}."
        )
    if finding in ("targets look wrong", "labels look wrong"):
        return (
            f"Its {noun} look wrong: predictions follow {_named(shift, noun)} only {max(shift.contrast, 0.0):.2f} "
            f"times as much as at other sites. Check that inputs and {noun} belong together."
        )
    if finding in ("targets look reversed", "labels look reversed"):
        return (
            f"Its {noun} look reversed: the other sites' head predicts low values of {_named(shift, noun)} where they "
            "are high here. Check the coding."
        )
    if finding == "targets look rescaled":
        return (
            f"Its values of {shift.target!r} look {1 / shift.contrast:.2g} times as large as at other sites. Check "
            "their unit."
        )
    relation = f"with the same {noun}"
    if noun == "labels" or (finding == "rows look different" and shift.steep):
        measured = f"predictions follow {_named(shift, noun)} {shift.contrast:.2f} times as much"
    else:
        measured = f"{shift.distance:.2f} standard deviations of {shift.target!r} apart; {MIN_DISTANCE} or more matters"
    if finding == "alike":
        return f"Its rows look like the other sites' rows {relation} ({measured})."
    if finding == "unknown":
        return f"Its rows differ from the other sites' rows {relation} ({measured}), perhaps by chance."
    direction = "" if shift.steep else f", namely like rows of {'higher' if shift.offset > 0 else 'lower'} values"
    return (
        f"Its rows look unlike the other sites' rows {relation} ({measured}{direction}). Check for different "
        f"equipment, differently preprocessed inputs, and {noun} measured in another way."
    )


def _named(shift: TargetShift, noun: str) -> str:
    return repr(shift.target) if noun == "targets" else "the labels"


def _on_distribution(targets: Sequence[TargetDistribution]) -> list[str]:
    """Describe the target whose mean differs most from elsewhere, if it differs by `FAR_MEAN` or more."""
    far = max(targets, key=lambda one: abs(one.distance), default=None)
    if far is None or abs(far.distance) < FAR_MEAN:
        return []
    direction = "higher" if far.distance > 0 else "lower"
    return [
        f"Its {far.name!r} is {abs(far.distance):.1f} standard deviations {direction} on average than elsewhere "
        f"({far.mean:.4g} against {far.mean_elsewhere:.4g}): for such values, the shared head depends on this site."
    ]


def _on_heads(recommendation: Recommendation, comparison: LossComparison | None, noun: str, *, unlike: bool) -> str:
    """Describe the heads' results on a site's held-out rows, and the conclusion."""
    if comparison is None:
        return f"It has fewer than {MIN_COMPARED} held-out rows for comparing heads."
    shares = {head: f"{100 * share:.0f} %" for head, share in comparison.explained.items()}
    most = f"{100 * max(comparison.gain[1], 0.0):.0f} %"
    tally = (
        f"On its {comparison.rows} held-out rows the shared head explains {shares['pooled']} of the variance of "
        f"the {noun}, its own head {shares['own']} and the other sites' head {shares['others']}"
    )
    return tally + conclusion(
        recommendation,
        comparison,
        unlike=unlike,
        can_stand_alone=True,
        lonely="",
        might=f"explain up to {most} more",
        at_most=f"explains at most {most} more",
    )
