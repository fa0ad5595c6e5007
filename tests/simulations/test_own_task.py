"""A task of a user's own, from its registration to the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.model import TransferModel
from fedhead.prediction import find_inputs, predict_inputs
from fedhead.simulations import simulate
from fedhead.tasks import Targets, tasks
from fedhead.tasks.multi_label import MultiLabel

pytestmark = pytest.mark.usefixtures("one_thread")


@tasks.register("graded")
class Ordinal(MultiLabel):
    """Ordered classes, as cumulative targets "above NAME": one column less than classes, all from one Gram matrix."""

    name = "graded"
    score_title = "Level right"

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        return tuple(f"above {name}" for name in samples.classes[:-1])

    @classmethod
    def require(cls, samples: Samples) -> None:
        tasks["classification"].require(samples)

    def encode(self, samples: Samples) -> Targets:
        places = np.array([self.level_of(name) for name in samples.classes])[samples.labels]
        return (places[:, None] > np.arange(len(self.columns))).astype(np.int64)

    def level_of(self, name: str) -> int:
        return (*self.columns, f"above {name}").index(f"above {name}")

    def decide(self, answers: Tensor) -> list[Any]:
        return [(f"level {level}",) for level in (answers > 0.5).sum(1).tolist()]

    def names(self, decision: tuple[str, ...]) -> tuple[str, ...]:
        return ()

    def recorded(self, decision: tuple[str, ...], by_class: Mapping[str, float]) -> dict[str, Any]:
        return {"level": decision[0], "above": dict(by_class)}


@pytest.fixture(scope="module")
def grades() -> Samples:
    """Digits, graded by whether they are below 3, below 6, or more."""
    digits = load_samples("digits")
    images = [np.asarray(digits.read(row)) for row in range(900)]
    names = np.array(["low", "middle", "top"])[np.minimum(digits.labels[:900] // 3, 2)]
    return samples_from_arrays(images, names.tolist(), spec="grades")


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_task_of_ones_own_runs_to_the_report(grades: Samples, rounds: int, tmp_path: Path) -> None:
    config = RunConfig(task="graded", rounds=rounds, simulation={"partition": "dirichlet:1"})
    result = simulate(config, grades, 4, out=tmp_path / "run")
    assert result.config.classes == ("above low", "above middle")
    assert result.score_held_out is not None
    assert result.score_held_out > 0.75
    page, card = ((tmp_path / "run" / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    assert "Level right" in page
    assert "above middle" in page and "above middle" in card
    model = TransferModel.load(tmp_path / "run")
    assert model.task.name == "graded"
    predicted = model.predict([grades.read(row) for row in range(200)])
    expected = [(f"level {('low', 'middle', 'top').index(grades.classes[label])}",) for label in grades.labels[:200]]
    assert np.mean([one == other for one, other in zip(predicted, expected, strict=True)]) > 0.8
    grades.read(0).save(tmp_path / "one.png")
    (prediction,) = predict_inputs(model, find_inputs([str(tmp_path / "one.png")], "image"))
    line = model.task.record(prediction.decision, prediction.answers, prediction.region)
    assert line["level"] == prediction.decision[0]
    assert list(line["above"]) == ["above low", "above middle"]
