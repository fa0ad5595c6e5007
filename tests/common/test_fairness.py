import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources
from fedhead.cli import app
from fedhead.data import Samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.subgroups import compare_groups, worst_group
from fedhead.fairness import GroupCounts, count_groups
from fedhead.heads import LinearHead
from fedhead.model import TransferModel

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("well", "ill")


@backbone_sources.register("fair")
def load_pixels(name: str, weights: str, layer: str, seed: int) -> Backbone:
    return Backbone("fair:pixels", nn.Flatten(), ImagePreprocessing(1, (2, 2), None, (0.0,), (1.0,)), layer=layer)


@pytest.fixture(scope="module")
def model() -> TransferModel:
    """A model that calls bright pictures of 2 x 2 pixels ill."""
    grey = load_pixels("pixels", "", "penultimate", 0)
    weight = torch.tensor([[-4.0] * 4, [4.0] * 4])
    return TransferModel(grey, LinearHead.from_weights(weight, torch.tensor([8.0, -8.0])), CLASSES)


def rows(count: int = 400, seed: int = 0, few: int = 3) -> tuple[Samples, np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Rows of two sexes, of which the second is often labelled otherwise, and of a few of a third group."""
    generator = np.random.default_rng(seed)
    brightness = generator.integers(0, 256, count)
    groups = np.where(np.arange(count) % 2 == 0, "f", "m")
    groups[:few] = "x"
    ill = brightness > 127
    noisy = generator.random(count) < np.where(groups == "m", 0.3, 0.05)
    labels = np.where(ill ^ noisy, "ill", "well")
    images = np.broadcast_to(brightness[:, None, None], (count, 2, 2)).astype(np.uint8)
    samples = samples_from_arrays(images, labels.tolist(), groups=groups.tolist(), spec=f"rows {count} {seed}")
    return samples, brightness, labels, groups


def test_groups_have_the_accuracy_of_their_rows_and_small_ones_are_withheld(model: TransferModel) -> None:
    samples, brightness, labels, groups = rows()
    counts = count_groups(model, samples)
    assert sorted(counts.groups) == ["f", "m"]
    assert counts.withheld == 1
    right = np.where(brightness > 127.5, "ill", "well") == labels
    found = {one.name: one for one in compare_groups(counts.groups, CLASSES)}
    for name in ("f", "m"):
        assert found[name].metrics.accuracy.value == pytest.approx(right[groups == name].mean())
        assert found[name].metrics.rows == (groups == name).sum()
    difference = right[groups == "m"].mean() - right[groups == "f"].mean()
    assert found["m"].difference == pytest.approx(difference)
    assert found["m"].low is not None
    assert found["m"].high is not None
    assert found["m"].low < difference < found["m"].high < 0
    said = worst_group(compare_groups(counts.groups, CLASSES))
    assert said.startswith("The worst group is 'm'")
    assert "lower than the other groups'" in said
    assert sorted(count_groups(model, samples, min_class_count=0).groups) == ["f", "m", "x"]


def test_counts_of_sites_add_to_those_of_all_rows(model: TransferModel, tmp_path: Path) -> None:
    samples, brightness, labels, groups = rows(few=0)
    whole = count_groups(model, samples)
    images = np.broadcast_to(brightness[:, None, None], (400, 2, 2)).astype(np.uint8)
    paths = []
    for start, stop in ((0, 150), (150, 400)):
        part = samples_from_arrays(
            images[start:stop], labels[start:stop].tolist(), groups=groups[start:stop].tolist(), spec=f"rows {start}"
        )
        paths.append(tmp_path / f"{start}.json")
        count_groups(model, part).save(paths[-1])
    added = GroupCounts.load(paths[0], model) + GroupCounts.load(paths[1], model)
    for name, sums in whole.groups.items():
        assert np.array_equal(sums.confusion, added.groups[name].confusion)
        assert np.array_equal(sums.scores, added.groups[name].scores)
        assert added.groups[name].loss_sum == pytest.approx(sums.loss_sum)


def test_each_groups_own_threshold_reaches_the_sensitivity(model: TransferModel) -> None:
    samples, brightness, labels, groups = rows(2000, few=0)
    counts = count_groups(model, samples)
    assert all(one.threshold is None for one in compare_groups(counts.groups, CLASSES))
    logits = 8 * (4 * brightness / 255 - 2)
    probability = 1 / (1 + np.exp(-logits))
    for one in compare_groups(counts.groups, CLASSES, sensitivity=0.8):
        assert one.threshold is not None
        own = groups == one.name
        above = probability >= one.threshold
        assert above[own & (labels == "ill")].mean() == pytest.approx(one.sensitivity, abs=1e-9)
        assert one.sensitivity is not None
        assert one.sensitivity >= 0.8
        assert (~above)[own & (labels == "well")].mean() == pytest.approx(one.specificity, abs=1e-9)
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            compare_groups(counts.groups, CLASSES, sensitivity=wrong)


def test_data_without_groups_or_with_small_groups_only(model: TransferModel) -> None:
    images = np.zeros((8, 2, 2), np.uint8)
    labels = ["well", "ill"] * 4
    with pytest.raises(UserError, match="has no groups"):
        count_groups(model, samples_from_arrays(images, labels, spec="no groups"))
    with pytest.raises(FedheadError, match="no group has 5 rows"):
        count_groups(model, samples_from_arrays(images, labels, groups=list("aabbccdd"), spec="small groups"))
    many = samples_from_arrays(
        np.zeros((101, 2, 2), np.uint8),
        ["well", "ill"] * 50 + ["ill"],
        groups=[str(n) for n in range(101)],
        spec="many",
    )
    with pytest.raises(UserError, match="100 at most"):
        count_groups(model, many)


def test_damaged_counts_are_rejected(model: TransferModel, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    count_groups(model, rows()[0]).save(path)
    values = json.loads(path.read_text())
    own = values["groups"]["f"]
    for change in (
        {"format": "other"},
        {"groups": {"f": {**own, "confusion": [[1, 0], [0, 1]]}}},
        {"groups": {"f": {**own, "confusion": [[-1, 0], [0, 1]]}}},
        {"groups": {"f": {**own, "scores": "x"}}},
        {"groups": {"f": {**own, "loss_sum": [float("nan")]}}},
        {"groups": {"f": {name: array for name, array in own.items() if name != "scores"}}},
        {"groups": [1, 2]},
        {"groups": {}},
        {"groups": {"f": {name: np.zeros_like(array).tolist() for name, array in own.items()}}},
        {"withheld": -1},
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match="damaged"):
            GroupCounts.load(path, model)
    path.write_text(json.dumps({**values, "groups": {"\x1b[2J": own}}))
    with pytest.raises(UserError, match="control characters"):
        GroupCounts.load(path, model)
    path.write_text(json.dumps({**values, "model": "0" * 64}))
    with pytest.raises(UserError, match="another model"):
        GroupCounts.load(path, model)


def test_the_command_adds_sites_and_names_the_worst_group(model: TransferModel, tmp_path: Path) -> None:
    model.backbone.save(tmp_path / "backbone.safetensors")
    model.save(tmp_path / "model.safetensors")
    for site in (1, 2):
        count_groups(model, rows(seed=site)[0]).save(tmp_path / f"{site}.json")
    arguments = ["fairness", str(tmp_path), "--counts", str(tmp_path / "1.json"), "--counts", str(tmp_path / "2.json")]
    result = CliRunner().invoke(app, [*arguments, "--sensitivity", "0.9"])
    assert result.exit_code == 0, result.output
    assert "The worst group is 'm'" in " ".join(result.output.split())
    assert "2 groups withheld" in " ".join(result.output.split())
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [one["name"] for one in found["groups"]] == ["m", "f"]
    nothing = CliRunner().invoke(app, ["fairness", str(tmp_path)])
    assert nothing.exit_code == 2
    assert "Give --data" in nothing.output
