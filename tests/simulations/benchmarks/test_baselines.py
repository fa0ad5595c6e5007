import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.errors import UserError
from fedhead.simulations.benchmarks.baselines import ALONE, EXCHANGE, fold_of
from fedhead.simulations.benchmarks.measurement import app
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def table(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 90)
    features = np.round(generator.normal(size=(180, 3)) + labels[:, None], 3)
    path = tmp_path / "rows.csv"
    lines = [
        ",".join(map(str, [*row, "yn"[label], number % 3]))
        for number, (row, label) in enumerate(zip(features, labels, strict=True))
    ]
    path.write_text("a,b,c,ill,site\n" + "\n".join(lines))
    return path, features, labels


def measured(path: Path, *flags: str) -> dict[str, list[dict[str, object]]]:
    asked = (
        "baselines",
        "--backbone",
        "identity",
        "--data",
        f"csv:{path}?label=ill",
        "--partition",
        "folder",
        "--json",
    )
    result = CliRunner().invoke(app, [*asked, *flags])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout.splitlines()[-1])["setting"]["runs"]
    assert isinstance(runs, dict)
    return runs


def test_every_fold_is_predicted_by_the_head_of_the_others(table: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, *_ = table
    runs = measured(path, "--folds", "3", "--rounds", "1", "--pooled")
    assert {EXCHANGE, "FedAvg from zeros, 1 round", "scikit-learn's gradient boosting", "0", "1", "2"} <= runs.keys()
    assert runs[EXCHANGE]["auroc"][0] > 0.85
    assert runs[EXCHANGE]["accuracy"][0] > runs["0"]["accuracy"][0] - 0.05
    assert ALONE not in runs


def test_a_head_of_a_test_set_is_the_one_that_all_rows_solve(
    table: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    path, features, labels = table
    fresh = np.round(np.random.default_rng(1).normal(size=(100, 3)) + 0.5, 3)
    true = fresh.sum(1) > 1.5
    other = tmp_path / "fresh.csv"
    other.write_text(
        "a,b,c,ill\n"
        + "\n".join(",".join(map(str, [*row, "yn"[int(one)]])) for row, one in zip(fresh, true, strict=True))
    )
    runs = measured(path, "--test-data", f"csv:{other}?label=ill", "--only", "exchange")
    assert list(runs) == [EXCHANGE]
    stats = FeatureStatistics.from_features(torch.from_numpy(features).float(), torch.from_numpy(1 - labels), 2)
    decided = solve_head(stats, "lda")(torch.from_numpy(fresh)).argmax(1).numpy()
    assert runs[EXCHANGE]["accuracy"][0] == pytest.approx(np.mean(decided == (1 - true)))


def test_rows_of_a_group_share_a_fold() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 3000).astype(np.uint64)
    folds = fold_of(np.concatenate([keys, keys]), 10)
    assert (folds[:3000] == folds[3000:]).all()
    assert np.bincount(folds, minlength=10).min() > 500


def test_scikit_learn_is_for_classes(table: tuple[Path, np.ndarray, np.ndarray]) -> None:
    asked = ("baselines", "--backbone", "identity", "--task", "regression", "--pooled", "--sites", "3")
    result = CliRunner().invoke(app, [*asked, "--data", f"csv:{table[0]}?target=a"])
    assert isinstance(result.exception, UserError)
    assert "--pooled fits classifiers" in str(result.exception)
