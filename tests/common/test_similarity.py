"""Similarities from sums: their whitening, search and verification, against direct computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import OAS
from sklearn.metrics import roc_curve
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import FedheadError, UserError
from fedhead.similarity import Similarity, most_similar, verify
from fedhead.simulations import simulate
from fedhead.sums.features import FeatureStatistics

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = {"min_class_count": 0, "min_rows": 0}


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Six classes in few directions, and larger differences within classes in the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 6
    means = torch.zeros(6, 12, dtype=torch.float64)
    means[:, :4] = 2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    spread = torch.tensor([0.5] * 4 + [6.0] * 8, dtype=torch.float64)
    return 5 + means[labels] + spread * torch.randn(300, 12, generator=generator, dtype=torch.float64), labels


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("similar") / "run"
    simulate(RunConfig(rounds=0, with_backbone=True, simulation={**OFF, "sites": 3}), out=folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, digits = tmp_path_factory.mktemp("pictures"), load_samples("digits")
    for number in range(120):
        folder = root / digits.classes[digits.labels[number]]
        folder.mkdir(exist_ok=True)
        digits.read(number).save(folder / f"{number}.png")
    return root


def test_whitening_is_that_of_the_shrunk_covariance_within_classes(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = rows
    parts = [FeatureStatistics.from_features(features[i::3], labels[i::3], 6) for i in range(3)]
    found = Similarity.from_statistics(sum(parts[1:], parts[0])).embed(features)
    centred = features - torch.stack([features[labels == c].mean(0) for c in range(6)])[labels]
    deviation = centred.square().mean(0).sqrt()
    covariance = (
        torch.diag(deviation)
        @ torch.from_numpy(OAS(assume_centered=True).fit((centred / deviation).numpy()).covariance_)
        @ torch.diag(deviation)
    )
    metric = torch.linalg.inv(covariance)
    about = features - features.mean(0)
    products = about @ metric @ about.T
    lengths = products.diagonal().sqrt()
    assert torch.allclose(found @ found.T, products / lengths / lengths[:, None], atol=1e-5)


def test_verification_agrees_with_all_pairs_of_scikit_learn(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = rows
    found = Similarity.from_statistics(FeatureStatistics.from_features(features, labels, 6)).embed(features)
    judged = verify(found, labels)
    cosines, pairs = 1 - cdist(found.numpy(), found.numpy(), "cosine"), np.triu_indices(300, 1)
    same = (labels[:, None] == labels).numpy()[pairs]
    passed, kept, _ = roc_curve(same, cosines[pairs])
    assert judged.equal_error_rate == pytest.approx(passed[np.argmin(np.abs(passed - (1 - kept)))], abs=2e-3)
    np.fill_diagonal(cosines, -2)
    assert judged.nearest == pytest.approx((labels[cosines.argmax(1)] == labels).double().mean().item())
    assert (judged.same, judged.different) == (same.sum(), (~same).sum())
    raw = verify(torch.nn.functional.normalize(features, dim=1), labels)
    assert judged.equal_error_rate < 0.75 * raw.equal_error_rate


def test_search_returns_the_most_similar_rows_in_order(
    rows: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = rows
    by = Similarity.from_statistics(FeatureStatistics.from_features(features, labels, 6))
    monkeypatch.setattr("fedhead.similarity._ROWS", 70)
    searched = torch.arange(10, 300)
    found = most_similar(by.embed(features[:5]), by, features, searched, 4)
    cosines = by.embed(features[:5]) @ by.embed(features[searched]).T
    assert [[one.row for one in matches] for matches in found] == (cosines.topk(4).indices + 10).tolist()
    assert found[0][0].similarity == pytest.approx(float(cosines[0].max()))


def test_rows_without_pairs_and_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="pairs of two classes"):
        verify(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    by = Similarity(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    with pytest.raises(FedheadError, match="not finite"):
        by.embed(torch.tensor([[1.0, float("nan")]]))


def test_the_command_compares_searches_and_verifies(finished: Path, pictures: Path) -> None:
    def lines(*words: str) -> list[dict[str, object]]:
        result = CliRunner().invoke(app, ["similar", str(finished), *words, "--json"])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    zeros, ones = sorted((pictures / "0").iterdir()), sorted((pictures / "1").iterdir())
    first, _, different = (line["similarity"] for line in lines(str(zeros[0]), str(zeros[0]), str(ones[0])))
    assert first == pytest.approx(1)
    assert isinstance(different, float)
    assert different < 0.5
    found = lines(str(zeros[1]), "--data", f"folder:{pictures}", "--top", "3")
    assert [line["rank"] for line in found] == [1, 2, 3]
    assert found[0]["label"] == "0"
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-5)
    (judged,) = lines("--data", f"folder:{pictures}")
    assert float(str(judged["equal_error_rate"])) < 0.2
    assert float(str(judged["nearest"])) > 0.85


def test_the_command_refuses_models_without_sums(finished: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "backbone.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    picture = str(next((pictures / "0").iterdir()))
    for words, said in (
        ((str(tmp_path), picture, picture), "has no sums of its sites' rows"),
        ((str(finished), picture), "Found 1 input;"),
        ((str(finished),), "Give two inputs or more"),
        ((str(finished), "--data", "digits", str(tmp_path / "none.png")), "does not exist"),
    ):
        result = CliRunner().invoke(app, ["similar", *words])
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())


def test_a_model_with_a_test_for_foreign_inputs_needs_no_run_folder(pictures: Path, tmp_path: Path) -> None:
    simulate(
        RunConfig(rounds=0, foreign=True, basis="unit", with_backbone=True, simulation={**OFF, "sites": 3}),
        out=tmp_path / "run",
    )
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (tmp_path / "run").glob("*.safetensors"):
        (moved / path.name).write_bytes(path.read_bytes())
    result = CliRunner().invoke(app, ["similar", str(moved), "--data", f"folder:{pictures}"])
    assert result.exit_code == 0, result.output
    rate = float(result.stdout.splitlines()[1].split(",")[3])
    assert rate < 0.2
    for path in (tmp_path / "run").glob("*.foreign.safetensors"):
        path.unlink()
    refused = CliRunner().invoke(app, ["similar", str(tmp_path / "run"), "--data", f"folder:{pictures}"])
    assert refused.exit_code == 2
    assert "mapped features" in " ".join(refused.output.split())
