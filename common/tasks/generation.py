"""Generation: a language model learns the answers in conversations, by low-rank adapters trained in rounds."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedhead.config import GENERATION_COLUMNS
from fedhead.data import IntArray, Samples
from fedhead.data.conversations import CONVERSATION
from fedhead.errors import UserError
from fedhead.evaluation.generation import GenerationReport, generation_report
from fedhead.sums.calibration import Calibration
from fedhead.sums.generation import GenerationSums, generation_sums
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.targets import LABELS
from fedhead.tasks.losses import AnswerLoss
from fedhead.tasks.task import Calibrated, Targets, Task, tasks

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.heads import Head

_TEXTS_ONLY = "A language model writes answers: use fedhead generate, or fedhead evaluate for its perplexity."


@tasks.register("generation")
class Generation(Task):
    """Conversations, without other targets: what is learned is in their answers."""

    name = "generation"
    output_names = ("output", "outputs")
    row_name = "conversation"
    score_name = "perplexity"
    score_title = "Perplexity"
    lower_is_better = True
    loss = AnswerLoss()
    kind = LABELS
    answer_name = "values"
    answer_meaning = "The loss of the answers in nats, their tokens, and whether the conversation was cut."
    family = "generation"
    misfit = "Its data holds no conversations; the site's own log has the details."
    scales_outputs = False
    calibrates = False
    pairs_losses = False
    counts_scores = False
    selects_by = "token_loss"
    solvers: ClassVar[tuple[str, ...]] = ()
    baseline_solver = "zeros"

    def check_columns(self) -> None:
        if self.columns != GENERATION_COLUMNS:
            raise UserError("The task 'generation' has no classes: leave them out.")

    @classmethod
    def kept_words(cls, number: int) -> str:
        return f"adapters of round {number} are kept" if number else "base model is kept"

    @property
    def groups(self) -> tuple[str, ...]:
        """A single group: every sum is over all conversations."""
        return ("of all",)

    @property
    def counted(self) -> tuple[str, ...]:
        return ("all conversations",)

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        return GENERATION_COLUMNS

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.annotated != CONVERSATION:
            raise UserError(
                "This run learns the answers in conversations, but its data holds none. Name a file of JSON lines with "
                "messages, or with prompt and completion, as in jsonl:conversations.jsonl."
            )

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        return np.zeros(len(samples), np.int64)

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        return np.arange(len(targets)), np.zeros(len(targets), np.int64)

    def strata(self, targets: Targets) -> IntArray:
        return np.zeros(len(targets), np.int64)

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        return tuple(init for init in head.inits if init == "zeros")

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        return self.loss.values(outputs, targets) / outputs[..., 1].clamp(min=1)

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[GenerationSums]:
        return generation_sums(outputs, owners, num_sites)

    def no_rows(self, bins: ScoreBins | None = None) -> GenerationSums:
        return GenerationSums.zeros()

    def score(self, score: float, loss: float, rows: float) -> float | None:
        """Return perplexity, given the tokens of answers and their loss."""
        return float(np.exp(min(loss / score, 700.0))) if score else None

    def mean_loss(self, score: float, loss: float, rows: float) -> float | None:
        """Return the loss of a token."""
        return loss / score if score else None

    def score_of(self, sums: GenerationSums) -> float | None:
        return self.report(sums).perplexity.value

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        return self.score_of(self._summed(outputs))

    def report(self, sums: GenerationSums) -> GenerationReport:
        return generation_report(sums)

    def curves(self, sums: GenerationSums) -> dict[str, Any]:
        return {}

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> GenerationSums:
        return self.no_rows() if outputs is None else self._summed(outputs)

    def judging(
        self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins
    ) -> GenerationSums:
        return self.choosing(outputs, targets, bins)

    def temperature(self, chosen: GenerationSums) -> float:
        return 1.0

    def calibrated(self, chosen: GenerationSums, judged: GenerationSums) -> Calibrated:
        return Calibrated(Calibration(), chosen.rows, {"rows_judged_on": judged.rows})

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        return outputs

    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> GenerationSums:
        return self._summed(outputs)

    def decide(self, answers: "Tensor") -> list[Any]:
        raise UserError(_TEXTS_ONLY)

    def regions(self, answers: "Tensor", calibration: Calibration, coverage: float) -> list[Any]:
        raise UserError("A language model has no prediction sets or intervals.")

    def covers(self, region: Any, target: Any) -> bool:
        raise UserError("A language model has no prediction sets or intervals.")

    def size(self, region: Any) -> float:
        raise UserError("A language model has no prediction sets or intervals.")

    def say_regions(self, held: str, stated: str, size: float) -> tuple[str, str]:
        raise UserError("A language model has no prediction sets or intervals.")

    @property
    def description(self) -> str:
        return "a language model that answers"

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        raise UserError(_TEXTS_ONLY)

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        raise UserError(_TEXTS_ONLY)

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        raise UserError(_TEXTS_ONLY)

    def _summed(self, outputs: "Tensor") -> GenerationSums:
        (sums,) = generation_sums(outputs, np.zeros(len(outputs), np.int64), 1)
        return sums
