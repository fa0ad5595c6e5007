"""Diagnosis of each site: how it compares with the pool, and a recommendation; tasks decide how sites are compared."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fedhead.evaluation.comparison import Comparison
from fedhead.evaluation.loss_comparison import LossComparison
from fedhead.evaluation.personal import PersonalHeads
from fedhead.evaluation.shift import Shift
from fedhead.evaluation.target_shift import TargetShift
from fedhead.heads import LinearHead
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Sums

WORTHWHILE = 0.1
"""Smallest difference that matters in accuracy, or in the share of the targets' variance that a head explains."""

Recommendation = Literal["join", "join with a local head", "stay local", "not enough rows to tell"]
Finding = Literal[
    "alike",
    "images look different",
    "classes look exchanged",
    "labels look wrong",
    "labels look reversed",
    "rows look different",
    "targets look rescaled",
    "targets look reversed",
    "targets look wrong",
    "unknown",
]

HEAD_LEVEL = 0.05
"""Level of the test whether two heads differ."""


@dataclass(frozen=True)
class SiteDiagnosis:
    """Comparison of a site with the pool, and a recommendation.

    Attributes:
        site: the name of the site.
        recommendation: the recommended action.
        finding: how the site's rows compare with the other sites'.
        reason: the reason, in words.
        rows: the number of training rows.
        classes: the number of classes, or of targets that vary, among them.
        shift: the shift of the site's rows; None if nothing could be compared.
        comparison: the heads' results on the site's held-out rows; None if there are too few.
    """

    site: str
    recommendation: Recommendation
    finding: Finding
    reason: str
    rows: int
    classes: int
    shift: Shift | TargetShift | None
    comparison: Comparison | LossComparison | None

    @property
    def unlike(self) -> bool:
        """Whether the site's rows differ from the other sites'."""
        return self.finding not in ("alike", "unknown")

    @property
    def sentence(self) -> str:
        """Recommendation and reason, for the site's engineer."""
        return f"{self.site}: {self.recommendation}. {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the sentence as JSON types."""
        parts = {"shift": self.shift, "comparison": self.comparison}
        nested = {name: part.to_dict() if part else None for name, part in parts.items()}
        return {**asdict(replace(self, shift=None, comparison=None)), **nested, "sentence": self.sentence}


class Diagnostics(ABC):
    """How sites are compared with the pool in a task.

    Attributes:
        nothing: sums over no rows, of the kind that compares the `HEADS` on held-out rows.
        scale: `[C]`, the divisors of errors that sites need; None if they need none.
    """

    nothing: Sums
    scale: npt.NDArray[np.float64] | None = None

    measures_harm: ClassVar[bool] = False
    """Whether `with_harm` is implemented."""

    @abstractmethod
    def heads(self, stats: FeatureStatistics) -> Mapping[str, LinearHead]:
        """Return the `HEADS` that a site with these training sums chooses from."""

    @abstractmethod
    def diagnose(self, site: str, stats: FeatureStatistics, sums: Sums | None) -> SiteDiagnosis:
        """Compare a site with the pool and recommend an action.

        Args:
            site: the name of the site.
            stats: its training sums.
            sums: the comparison of its heads on its held-out rows; None if its reply could not be used.
        """

    def with_harm(self, diagnosis: SiteDiagnosis, elsewhere: Sums) -> SiteDiagnosis:
        """Return a diagnosis that includes the effect of the site's rows on the other sites.

        Args:
            diagnosis: of the site.
            elsewhere: the comparison of the same heads on the held-out rows of all other sites.
        """
        return diagnosis


def recommend(
    *,
    unlike: bool,
    spoilt: bool,
    comparison: Comparison | LossComparison | None,
    skilled: Callable[[str], bool],
    can_stand_alone: bool,
) -> Recommendation:
    """Recommend an action to a site.

    A site with shifted rows should stay local, unless the pooled head is significantly better than its own or the
    others' head does no harm. A site without a shift is recommended a local head beside the shared one only if its own
    head is significantly better. If neither head is better, a recommendation needs enough rows to rule out a difference
    of `WORTHWHILE`.

    Args:
        unlike: whether the site's rows differ from the others'.
        spoilt: whether its targets are wrong, so that no comparison on them counts.
        comparison: of the heads on its held-out rows.
        skilled: returns whether a head predicts the site's targets better than by a guess.
        can_stand_alone: whether its rows determine a head.
    """
    if comparison is None or spoilt:
        return "stay local" if unlike else "not enough rows to tell"
    differ = comparison.p_value < HEAD_LEVEL
    worse = differ and comparison.own_is_worse
    harmless = comparison.gain_over_others[1] < WORTHWHILE and skilled("others")
    if unlike:
        return "join" if harmless or (worse and skilled("pooled")) else "stay local"
    if differ and not worse and can_stand_alone:
        return "join with a local head"
    return "join" if worse or comparison.gain[1] < WORTHWHILE else "not enough rows to tell"


def conclusion(
    recommendation: Recommendation,
    comparison: Comparison | LossComparison,
    *,
    unlike: bool,
    can_stand_alone: bool,
    lonely: str,
    might: str,
    at_most: str,
) -> str:
    """Return the end of a sentence about compared heads.

    Args:
        recommendation: the recommended action.
        comparison: of the heads.
        unlike: whether the site's rows differ from the others'.
        can_stand_alone: whether its rows determine a head.
        lonely: the reason if they do not.
        might: the largest plausible advantage of its own head as a verb, such as "be up to 12 % better".
        at_most: the same, such as "is at most 12 % better".
    """
    if recommendation == "stay local":
        return "."
    if recommendation == "not enough rows to tell":
        return f"; its own head might still {might}."
    if recommendation == "join with a local head":
        return f"; it needs a head of its own beside the shared one (p = {comparison.p_value:.2g})."
    if comparison.p_value < HEAD_LEVEL and comparison.own_is_worse:
        return f"; it benefits from the other sites (p = {comparison.p_value:.2g})."
    if unlike:
        return "; the difference does no harm."
    return f"; its own head {at_most if can_stand_alone else lonely}."


def delivered(diagnosis: SiteDiagnosis, personal: PersonalHeads | None) -> SiteDiagnosis:
    """Return a diagnosis that includes the results of the site's personal head; unchanged without one.

    A site that should join with a local head, or is better off alone, then has a head that joins both.
    """
    found = personal.sites.get(diagnosis.site) if personal is not None else None
    if found is None:
        return diagnosis
    said = f" Its personal head, which it keeps, classifies {found.right['personal']} of {found.rows} correctly."
    return replace(diagnosis, reason=diagnosis.reason + said)
