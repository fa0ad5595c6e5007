"""Runs on mapped features, from the first exchange to the delivered model."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.client.release.ledger import ledger_path, read_ledger
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.heads import MappedHead
from fedhead.heads.feature_map import unit_rows
from fedhead.membership import join, leave
from fedhead.model import TransferModel
from fedhead.simulations import RunResult, simulate
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics

ROWS = 300
SITES = [np.arange(start, ROWS, 3) for start in range(3)]
OFF = {"min_class_count": 0, "min_rows": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digits(rows: Any) -> Samples:
    whole = load_samples("digits")
    chosen = [int(row) for row in rows]
    return samples_from_arrays([whole.read(row) for row in chosen], [str(whole.labels[row]) for row in chosen])


@pytest.fixture(scope="module")
def samples() -> Samples:
    return digits(range(ROWS))


def run(samples: Samples, out: str = "run", **settings: Any) -> RunResult:
    config = RunConfig(**{"rounds": 0, "simulation": OFF, **settings})
    return simulate(config, samples, list(SITES), out=out)


def test_the_head_is_that_of_all_rows_of_unit_length(samples: Samples) -> None:
    result = run(samples, basis="unit")
    assert result.config.init == "lda-gcv"
    features = FeatureStore.open(result.model.backbone, samples).features.double()
    labels = torch.tensor([int(one) for one in samples.labels])
    rows = unit_rows(features, "unit")
    expected = solve_head(FeatureStatistics.from_features(rows, labels, 10, rows[0]), "lda-gcv")
    with torch.no_grad():
        torch.testing.assert_close(result.model.head(features.float()).double(), expected(rows), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "auto"},
        {"basis": "unit", "head": "cosine"},
        {"basis": "unit", "head": "mlp:8"},
        {"lift": "landmarks:64"},
        {"lift": "relu:64"},
    ],
    ids=str,
)
def test_a_model_answers_as_its_run_was_evaluated(samples: Samples, settings: dict[str, Any]) -> None:
    result = run(samples, rounds=2, **settings)
    assert isinstance(result.model.head, MappedHead)
    assert result.history[-1].score is not None
    loaded = TransferModel.load("run", result.model.backbone)
    items = [samples.read(row) for row in range(40)]
    assert torch.equal(loaded.answers(items), result.model.answers(items))
    right = sum(one == str(samples.labels[row]) for row, one in enumerate(loaded.predict(items)))
    assert right >= (12 if settings.get("head") == "mlp:8" else 34)


@pytest.mark.parametrize("settings", [{"basis": "unit"}, {"lift": "landmarks:64"}, {"lift": "relu:64"}], ids=str)
def test_a_site_that_leaves_and_joins_again_changes_nothing(samples: Samples, settings: dict[str, Any]) -> None:
    before = run(samples, **settings).model
    taken_out = leave("run", "site-2")
    assert taken_out.rows_after < taken_out.rows_before
    between = TransferModel.load("run", before.backbone)
    back = join("run", "site-2", digits(SITES[2]), **OFF)
    assert back.rows_after == taken_out.rows_before
    after = TransferModel.load("run", before.backbone)
    features = FeatureStore.open(before.backbone, samples).features
    with torch.no_grad():
        assert not torch.allclose(between.head(features), before.head(features), atol=1e-3)
        torch.testing.assert_close(after.head(features), before.head(features), atol=1e-4, rtol=1e-4)


def test_a_lift_asks_a_site_for_more_rows(samples: Samples) -> None:
    guard = {"min_class_count": 0, "min_rows": 40}
    # 192 features of glyphnet; 600 ask for 125 rows, and each site has 100.
    with pytest.raises(FedheadError, match=r"no sums of 600 features leave.*for 125"):
        run(samples, lift="relu:600", simulation=guard)
    assert run(samples, lift="relu:300", simulation=guard).config.lift == "relu:300"
    shutil.copytree("run", "copy")
    leave("copy", "site-2")
    with pytest.raises(UserError, match="no sums of 300 features leave"):
        join("copy", "site-2", digits(SITES[2]), min_rows=80, min_class_count=0)


def test_the_ledger_says_of_how_many_features_sums_are(samples: Samples) -> None:
    run(samples, lift="relu:300")
    leave("run", "site-2")
    join("run", "site-2", digits(SITES[2]), **OFF)
    entries = read_ledger(ledger_path("site-2"))
    assert [entry.features for entry in entries[-2:]] == ["unit+relu:300"] * 2
