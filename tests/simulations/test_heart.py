"""Heart disease at four hospitals, a real table with missing values and categories."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fedhead.backbones.identity import parse_columns
from fedhead.config import RunConfig
from fedhead.prediction import find_inputs, predict_inputs
from fedhead.simulations import simulate

FEATURES = (
    "features=Age,trestbps,chol,thalch,oldpeak,ca&categories=sex,cp,fbs,restecg,exang,slope,thal"
    "&missing=chol:0,trestbps:0"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def heart(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table with a column of two classes."""
    path = tmp_path_factory.mktemp("heart") / "heart.csv"
    with (assets / "heart" / "heart_disease_uci.csv").open(newline="") as file:
        rows = [{**row, "disease": "yes" if int(row["HeartDisease"]) else "no"} for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_four_hospitals_in_one_exchange(heart: Path, tmp_path: Path) -> None:
    data = f"csv:{heart}?label=disease&site=dataset&{FEATURES}"
    config = RunConfig(backbone="identity", rounds=0, simulation={"data": data, "partition": "folder"})
    result = simulate(config, out=tmp_path / "run")
    assert sorted(result.sites) == ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
    auroc = result.evaluation.auroc.value
    assert auroc is not None and auroc > 0.88
    options = "missing=chol:0,trestbps:0"
    columns = parse_columns(result.config.backbone.partition(":")[2])[0]
    inputs = find_inputs([f"csv:{heart}?{options}"], "table", columns)
    predictions = list(predict_inputs(result.model, inputs))
    assert len(predictions) == 920 and not any(one.error for one in predictions)
    with heart.open(newline="") as file:
        true = [row["disease"] for row in csv.DictReader(file)]
    assert np.mean([one.decision == other for one, other in zip(predictions, true, strict=True)]) > 0.8
