"""The history of a run, with an entry for each head, and its outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedhead.adaptation import Adaptation
from fedhead.backbones import Backbone
from fedhead.backbones.split import Tail, merged
from fedhead.config import RunConfig
from fedhead.evaluation.coverage import ClassCoverage
from fedhead.evaluation.diagnosis import SiteDiagnosis
from fedhead.evaluation.foreign import Foreign
from fedhead.evaluation.personal import PersonalHeads
from fedhead.heads import Head, TunedHead, delivered_spec
from fedhead.model import TransferModel
from fedhead.protocol.fields import wrong_fields
from fedhead.server.exchange import POOL
from fedhead.server.traffic import Traffic
from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.features import FeatureStatistics
from fedhead.tasks import Calibrated


@dataclass(frozen=True)
class Round:
    """One line of the history: a head, its making, and its scores.

    Attributes:
        number: 0 is the head that the run starts from.
        sites: the number of sites whose replies made the head.
        seconds: the time for making and evaluating it.
        bytes_down: payload sent to sites for it.
        bytes_up: payload that sites sent.
        train_loss: the sites' mean loss while they trained it; None for round 0.
        loss: the mean loss on the held-out rows of the sites that evaluated it, as the task defines it.
        score: the task's score on these rows, such as the accuracy; None (like `loss`) if nothing is held out.
        test_score: the same on the pooled test set, if there is one.
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
    score: float | None = None
    test_score: float | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)
    joined: Sequence[str] = ()

    @classmethod
    def from_line(cls, values: Mapping[str, Any]) -> "Round":
        """Read a line of `metrics.jsonl`; earlier versions called the score accuracy.

        Raises:
            TypeError: if it has other keys.
            ValueError: naming the values of another type.
        """
        earlier = {"accuracy": "score", "test_accuracy": "test_score"}
        read = cls(**{earlier.get(name, name): value for name, value in values.items()})
        try:
            return _ROUND.validate_python(asdict(read))
        except ValidationError as error:
            raise ValueError(f"these values are of another type: {wrong_fields(error)}") from None


_ROUND = TypeAdapter(Round)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        head: the head that is delivered, for features as they are.
        kept_round: the round it comes from, the best by pooled held-out loss.
        all_rows: whether it is solved again of all rows, held-out ones included, from statistics of the features that
            it is for; its reported figures were measured without them. Otherwise it has seen no held-out row.
        history: from round 0.
        participants: the sites that took part.
        sites: the kept head's evaluation at each of them that has held-out rows; under secure summation at `POOL`.
        calibrated: the kept head's temperature and its effect, where rows are held out. A head solved again of all
            rows is taken to have the same.
        diagnoses: the comparison of each site with the pool, where statistics are kept and rows have one class each.
        coverage: which sites hold which classes, where statistics were summed.
        refused: sites that could not take part, with the reason.
        full_model_bytes: the payload if backbone and head had been exchanged in each round.
        statistics: the sites' training rows summed, where the first head was solved of them.
        traffic: payload by site and by action.
        unlearned: classes without rows at any site, according to the statistics.
        choices: the comparisons of heads that decided the run, as JSON types; see `fedhead.server.selection.Choice`.
        settled: the settings that they decided, by name.
        clusters: of a run without labels, the rows and sites of each cluster, and the likelihood of other numbers of
            clusters, as JSON types.
        tuning: of a tuned run, the kept head and the number of trained parameters, as JSON types.
        before: of a language model, the evaluation of the base model at each site; see `sites`.
        personal: the results of the sites' personal heads, if they made any.
        subgroups: the kept head's evaluation by subgroup, the worst first, as JSON types; empty without any.
        adaptation: of the head to rows without labels, if the run compared any.
        foreign: the test for foreign inputs, if the run asked for one.
        attack: the outcome of an attack on such heads, if a simulation asked for one.
        privacy: of a private run, its unit and budget, and the head's noisy evaluation.
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
    choices: Sequence[Mapping[str, Any]] = ()
    settled: Mapping[str, Any] = field(default_factory=dict)
    personal: PersonalHeads | None = None
    adaptation: Adaptation | None = None
    foreign: Foreign | None = None
    privacy: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    clusters: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    subgroups: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)

    @property
    def single_sites(self) -> Mapping[str, EvaluationSums]:
        """The kept head's evaluation at each site; empty under secure summation, which shows only their total."""
        return {} if POOL in self.sites else self.sites

    @property
    def num_evaluated(self) -> int:
        """The number of sites in the evaluation of the kept head."""
        return len(self.participants) if POOL in self.sites else len(self.sites)

    def model(self, backbone: Backbone, config: RunConfig) -> TransferModel:
        """Return the delivered model: the head on its backbone, tuned or as it was, calibrated."""
        head = self.head
        if isinstance(head, TunedHead):
            assert isinstance(head.tail, Tail)
            backbone, head = merged(backbone, head.tail, head.tail_parameters), head.head
        return TransferModel(
            backbone,
            head,
            config.classes,
            delivered_spec(head, config.head),
            task=config.task,
            calibration=self.calibrated.calibration if self.calibrated else None,
            unlearned=self.unlearned,
            foreign=self.foreign,
        )
