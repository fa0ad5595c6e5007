"""What a run tells of itself: a line for each head, and what it ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedhead.backbones import Backbone
from fedhead.calibration import Calibration, CalibrationSums
from fedhead.config import RunConfig
from fedhead.diagnosis import ClassCoverage, SiteDiagnosis
from fedhead.heads import Head
from fedhead.metrics import EvaluationSums, reliability
from fedhead.model import TransferModel
from fedhead.server.exchange import Traffic
from fedhead.statistics import FeatureStatistics


@dataclass(frozen=True)
class Round:
    """One line of the history: a head, how it came about, and how it does.

    Attributes:
        number: 0 is the head that the run starts from.
        sites: how many sites' replies made the head.
        seconds: what making and evaluating it took.
        bytes_down: payload sent to sites for it.
        bytes_up: payload that sites sent.
        train_loss: the sites' mean loss while they trained it; None for round 0.
        loss: the mean loss on the held-out rows of the sites that evaluated it: cross entropy, or of multi-label rows
            binary cross entropy.
        accuracy: the share of these rows that is right, of multi-label rows with all labels; None (like `loss`) where
            nothing is held out.
        test_accuracy: the same on the pooled test set, where there is one.
        dropped: sites whose replies did not count, with the reason.
        joined: sites that came late or returned, and took part for the first time since.
    """

    number: int
    sites: int
    seconds: float
    bytes_down: int
    bytes_up: int
    train_loss: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)
    joined: Sequence[str] = ()


@dataclass(frozen=True)
class Calibrated:
    """A head's calibration, and what says that it is one.

    Attributes:
        calibration: for the model.
        rows: how many held-out rows chose the temperature.
        judged: what it brought on the others.
    """

    calibration: Calibration
    rows: int
    judged: CalibrationSums

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: expected calibration error and mean loss before and after."""
        before, after = self.judged.before, self.judged.after
        return {
            "temperature": self.calibration.temperature,
            "rows_chosen_on": self.rows,
            "rows_judged_on": before.rows,
            "before": {"loss": before.loss_sum / max(before.rows, 1), "reliability": reliability(before).to_dict()},
            "after": {"loss": after.loss_sum / max(after.rows, 1), "reliability": reliability(after).to_dict()},
        }


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Attributes:
        head: the head that is delivered, for features as they are.
        kept_round: the round it comes from, the best by pooled held-out loss.
        all_rows: whether it is the statistics head solved again of all rows, held-out ones included; what is reported
            of it was measured without them. Else it has seen no held-out row.
        history: from round 0.
        participants: the sites that took part.
        sites: how the kept head does on the held-out rows of each of them that has any.
        calibrated: the kept head's temperature and what it brings, where rows are held out. A head solved again of all
            rows is taken to have the same.
        diagnoses: how each site stands to the pool, where statistics are kept and rows have one class each.
        coverage: which sites hold which classes, where statistics were summed.
        refused: sites that could not take part, with the reason.
        full_model_bytes: what exchanging backbone and head each round would have taken.
        statistics: the sites' training rows summed, where the first head was solved of them.
        traffic: payload by site and by action.
        unlearned: classes of which no site had a row, as far as statistics tell.
    """

    head: Head
    kept_round: int
    all_rows: bool
    history: Sequence[Round]
    participants: Sequence[str]
    sites: Mapping[str, EvaluationSums]
    calibrated: Calibrated | None
    diagnoses: Sequence[SiteDiagnosis]
    coverage: Sequence[ClassCoverage]
    refused: Mapping[str, str]
    full_model_bytes: int
    statistics: FeatureStatistics | None
    traffic: Traffic
    unlearned: Sequence[str] = ()

    def model(self, backbone: Backbone, config: RunConfig) -> TransferModel:
        """Return what the run delivers: the head on its backbone, calibrated."""
        return TransferModel(
            backbone,
            self.head,
            config.classes,
            config.head,
            multi_label=config.multi_label,
            calibration=self.calibrated.calibration if self.calibrated else None,
            unlearned=self.unlearned,
        )
