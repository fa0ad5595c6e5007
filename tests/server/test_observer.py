from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhead.config import RunConfig
from fedhead.data import load_samples, samples_from_arrays
from fedhead.errors import FedheadError
from fedhead.server.observer import EachRound, Observer, Observers, SiteState
from fedhead.simulations import simulate


class Diary(Observer):
    """Writes down everything that it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self.told.append(("started", run_dir))

    def on_step(self, step: str, server_round: int) -> None:
        self.told.append(("step", (step, server_round)))

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self.told.append(("sites", dict(sites)))

    def on_waiting(self, reason: str) -> None:
        self.told.append(("waiting", reason))

    def on_round(self, finished: Any) -> None:
        self.told.append(("round", finished.number))

    def on_finished(self, outcome: Any) -> None:
        self.told.append(("finished", outcome))

    def on_failed(self, error: BaseException) -> None:
        self.told.append(("failed", error))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.told if name == kind]


def some_digits(rows: int) -> Any:
    whole = load_samples("digits")
    return samples_from_arrays([whole.read(row) for row in range(rows)], whole.labels[:rows], spec="some digits")


def test_a_run_is_told_from_its_start_to_its_end(tmp_path: Path) -> None:
    first, second = Diary(), Diary()
    result = simulate(
        RunConfig(rounds=2, init="nearest-mean", simulation={"min_class_count": 0, "min_rows": 30}),
        some_digits(180),
        [np.arange(100), np.arange(100, 170), np.arange(170, 180)],
        out=tmp_path / "run",
        observers=[first, second],
    )
    assert [kind for kind, _ in first.told] == [kind for kind, _ in second.told]
    assert first.told[0] == ("started", tmp_path / "run")
    assert first.told[-1] == ("finished", result.outcome)
    steps = ["describe", "statistics", "standardise", "train", "train", "evaluate", "finish"]
    assert first.of("step") == list(zip(steps, (0, 0, 0, 1, 2, 2, 2), strict=True))
    assert first.of("round") == [0, 1, 2]
    sites = first.of("sites")[-1]
    assert {name: state.standing for name, state in sites.items()} == {
        "site-0": "ready",
        "site-1": "ready",
        "site-2": "refused",
    }
    assert [sites[name].rows for name in ("site-0", "site-1")] == [100, 70]
    assert "too few rows" in sites["site-2"].reason


def test_what_ends_a_run_is_told_to_all_and_kept(tmp_path: Path) -> None:
    def fail(finished: Any) -> None:
        raise FedheadError("The disk is full.")

    diary = Diary()
    with pytest.raises(FedheadError, match="disk is full"):
        simulate(
            RunConfig(rounds=2, init="zeros"),
            some_digits(180),
            2,
            out=tmp_path / "run",
            observers=[EachRound(fail), diary],
        )
    assert [str(error) for error in diary.of("failed")] == ["The disk is full."]
    assert diary.of("finished") == []


def test_observers_without_a_method_are_passed_over() -> None:
    diary = Diary()
    Observers([Observer(), diary]).on_waiting("Waiting for a second site.")
    assert diary.told == [("waiting", "Waiting for a second site.")]


def test_an_observer_that_fails_at_the_end_does_not_hide_the_runs_error(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def on_failed(self, error: BaseException) -> None:
            raise OSError("The tracker is gone.")

    diary = Diary()
    Observers([Broken(), diary]).on_failed(FedheadError("Too few sites."))
    assert [str(error) for error in diary.of("failed")] == ["Too few sites."]
    assert "Broken failed" in caplog.text
