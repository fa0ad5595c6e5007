"""The result of a simulated run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedhead.server.runs.examples import Example, write_examples
from fedhead.server.runs.result import CompletedRun
from fedhead.server.runs.summary import RunSummary


@dataclass(frozen=True, kw_only=True)
class RunResult(CompletedRun):
    """The result of a simulated run.

    Attributes:
        config: the run, including everything that its data decides.
        model: the delivered model.
        outcome: history, per-site scores, refusals and traffic.
        test_score: of the delivered model on the pooled test set; None without one.
        empty_sites: sites that the partition left without rows; they took no part.
        skipped: why each unreadable row was skipped, by row.
        withheld: the number of rows that each site's guard withheld, where it did.
        extracted: the number of rows that the backbone ran over; the others' features were stored already.
        seconds: of extraction, of the rounds, and in total, by name.
        examples: drawn held-out images, if the run asked for any.
        run_dir: the run folder, if there is one.
    """

    empty_sites: tuple[str, ...]
    skipped: Mapping[int, str]
    withheld: Mapping[str, int]
    extracted: int
    seconds: Mapping[str, float]
    examples: tuple[Example, ...] = ()

    def write_to(self, folder: Path) -> None:
        write_examples(folder, self.examples)
        super().write_to(folder)

    @property
    def record(self) -> RunSummary:
        """The figures that `result.json` holds."""
        return super().record.model_copy(
            update={
                "seconds": self.seconds["total"],
                "seconds_extraction": self.seconds["extraction"],
                "seconds_rounds": self.seconds["rounds"],
                "rows_extracted": self.extracted,
                "rows_skipped": len(self.skipped),
                "rows_withheld": sum(self.withheld.values()),
                "sites_empty": list(self.empty_sites),
            }
        )
