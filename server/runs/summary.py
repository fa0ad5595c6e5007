"""The closing summary of a run: the file `result.json`, the same for a simulation and for a run over real sites."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedhead.errors import UserError
from fedhead.files import write_atomically

RESULT = "result.json"
"""The file's name; a folder without it belongs to a run that did not finish."""

_ENDINGS = ("", "_held_out", "_test", "_one_exchange", "_after_rounds", "_mean_site", "_worst_site", "_solved")


class RunSummary(BaseModel):
    """The figures of a finished run; those that do not apply to it are None.

    The file calls the scores by the score's own name, for example `accuracy_held_out`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    score: float | None = Field(None, description="On the pooled test set if there is one, else on held-out rows.")
    score_name: str = Field("accuracy", description="What the score is, such as `accuracy` or `r2`.")
    score_held_out: float | None = Field(None, description="Of the kept head on the pooled held-out rows.")
    score_test: float | None = Field(None, description="Of the delivered head on the pooled test set.")
    score_one_exchange: float | None = Field(None, description="Of the head solved from statistics.")
    score_after_rounds: float | None = Field(None, description="Of the last head; None without rounds.")
    score_mean_site: float | None = Field(None, description="Mean over sites, on their held-out rows.")
    score_worst_site: float | None = Field(None, description="Of the worst site.")
    score_solved: float | None = Field(None, description="Of a tuned run: before tuning.")
    kept: str | None = Field(
        None,
        description="Of a tuned run: the delivered model, 'tuned', 'solved' or 'base'; 'personal' if "
        "each site keeps a tuned model of its own, and the solved head is delivered.",
    )
    trainable_parameters: int | None = Field(None, ge=0, description="Of a tuned run: the parameters that trained.")
    rounds: int | None = Field(None, ge=0, description="Number of rounds asked for.")
    kept_round: int = Field(ge=0, description="Round of the delivered head; 0 for the starting head.")
    sites: int = Field(ge=0, description="Number of sites that took part.")
    bytes_down: int | None = Field(None, ge=0, description="Payload from the coordinator to all sites.")
    bytes_up: int | None = Field(None, ge=0, description="Payload from all sites to the coordinator.")
    bytes_full_model: int = Field(0, ge=0, description="Payload if the whole model had travelled in each round.")
    seconds: float | None = Field(None, ge=0, description="Of a simulation: everything.")
    seconds_extraction: float | None = Field(None, ge=0, description="Of a simulation: features.")
    seconds_rounds: float | None = Field(None, ge=0, description="Of a simulation: exchanges with the sites.")
    rows_extracted: int | None = Field(None, ge=0, description="Of a simulation: rows that the backbone ran over.")
    rows_skipped: int | None = Field(None, ge=0, description="Of a simulation: unreadable rows.")
    rows_withheld: int | None = Field(None, ge=0, description="Of a simulation: rows that the sites' guards withheld.")
    sites_empty: list[str] | None = Field(None, description="Of a simulation: sites without rows.")
    sites_refused: dict[str, str] = Field({}, description="Sites that could not take part, with the reason.")
    choices: list[dict[str, Any]] = Field([], description="Comparisons of heads on held-out rows, and their results.")
    subgroups: list[dict[str, Any]] = Field([], description="Metrics by subgroup, the worst by accuracy first.")
    worst_subgroup: str | None = Field(None, description="The finding about the worst subgroup in a sentence.")
    run_dir: str | None = Field(None, description="The run folder.")
    membership: dict[str, Any] | None = Field(None, description="The last change of membership since the run, if any.")

    @model_validator(mode="before")
    @classmethod
    def _scores_by_their_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        name = values.get("score_name", "accuracy")
        for ending in _ENDINGS:
            if (called := f"{name}{ending}") in values:
                values.setdefault(f"score{ending}", values.pop(called))
        return values

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the summary in a run folder; None if the run did not finish.

        Raises:
            UserError: if the file is damaged.
        """
        file = path / RESULT
        try:
            return cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(damaged(file, error)) from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from None

    def write(self, path: Path) -> None:
        """Write the file in a run folder, which makes the run a finished one."""
        write_atomically(path / RESULT, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; the score's family has its own name, such as `accuracy`."""
        values = self.model_dump()
        scores = {f"{self.score_name}{ending}": values.pop(f"score{ending}") for ending in _ENDINGS[1:]}
        if values["membership"] is None:
            del values["membership"]
        first = {"score": values.pop("score"), "score_name": values.pop("score_name")}
        return {**first, self.score_name: self.score, **scores, **values}

    def after(self, membership: Mapping[str, Any]) -> Self:
        """Return the summary with a change of membership."""
        return self.model_copy(update={"membership": dict(membership)})


def damaged(file: Path, error: ValueError) -> str:
    """Return the sentence about a JSON file with other content than expected."""
    if not isinstance(error, ValidationError):
        return f"{file} is damaged: {error}."
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{file} is damaged: {f'{where}: ' if where else ''}{first['msg'].lower()}."
