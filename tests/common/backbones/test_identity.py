from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.backbones import load_backbone
from fedhead.backbones.backbone import Backbone
from fedhead.backbones.identity import identity_for, identity_spec
from fedhead.backbones.weights import find_backbone
from fedhead.config import RunConfig
from fedhead.data import Columns, TableRow, load_samples
from fedhead.errors import UserError
from fedhead.simulations import simulate


def write_table(path: Path, order: tuple[str, ...] = ("a", "b", "c")) -> str:
    generator = np.random.default_rng(0)
    lines = [",".join([*order, "label"])]
    for row in range(120):
        label = row % 2
        values = dict(zip("abc", generator.normal(2 * label, 1, 3), strict=True))
        lines.append(",".join([*(f"{values[name]:.6f}" for name in order), "xy"[label]]))
    path.write_text("\n".join(lines) + "\n")
    return f"csv:{path}"


def test_features_are_the_named_columns_in_their_order() -> None:
    backbone = load_backbone("identity:b,a")
    row = TableRow(Columns(("a", "b", "c")), np.array([1.0, 2.0, 3.0]))
    assert backbone.features_of([row]).tolist() == [[2.0, 1.0]]
    assert (backbone.kind, backbone.num_features, backbone.num_bytes) == ("table", 2, 0)
    assert backbone.features_of([row]).dtype == torch.float32


@pytest.mark.parametrize("names", [("a", "b"), ("size, mm", "100 %", "a%2Cb"), ("caf\udce9", "ü")])
def test_a_spec_names_any_columns(names: tuple[str, ...], tmp_path: Path) -> None:
    backbone = load_backbone(identity_spec(names))
    assert backbone.spec == identity_spec(names)
    assert backbone.preprocessing.describe() == {"columns": list(names)}
    digest = backbone.digest
    assert digest != load_backbone(identity_spec(names[::-1])).digest
    if not any("\udce9" in name for name in names):
        backbone.save(tmp_path / "b.safetensors")
        assert Backbone.load(tmp_path / "b.safetensors").digest == digest


def test_identity_needs_no_download() -> None:
    backbone = load_backbone("identity:a,b")
    found = find_backbone(backbone.spec, backbone.layer, backbone.weights_digest)
    assert found is not None
    assert found.digest == backbone.digest


def test_wrong_rows_and_specs_are_rejected() -> None:
    backbone = load_backbone("identity:a,b")
    with pytest.raises(UserError, match=r"lacks 1 of the 2 columns of numbers that the model needs: 'b'\. It has: 'a'"):
        backbone.features_of([TableRow(Columns(("a", "c")), np.zeros(2))])
    with pytest.raises(UserError, match="given an image or a text"):
        backbone.features_of(["a text"])
    with pytest.raises(UserError, match="'b' has the value 1e\\+300, too large"):
        backbone.features_of([TableRow(Columns(("a", "b")), np.array([1, 1e300]))])
    with pytest.raises(UserError, match="name the columns, as in 'identity:age,pulse'"):
        load_backbone("identity")
    with pytest.raises(UserError, match="'a' twice"):
        load_backbone("identity:a,b,a")
    with pytest.raises(UserError, match="only the layer 'penultimate'"):
        load_backbone("identity:a,b", layer="x")


def test_table_classification_in_one_exchange(tmp_path: Path) -> None:
    data = write_table(tmp_path / "t.csv")
    config = RunConfig(backbone="identity", rounds=0, simulation={"sites": 3, "partition": "iid"})
    result = simulate(config, data, out=tmp_path / "run")
    assert result.config.backbone == "identity:a,b,c"
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    other = load_samples(write_table(tmp_path / "u.csv", ("c", "a", "b")))
    probabilities = result.model.backbone.features_of([other.read(0)])
    assert torch.equal(probabilities, result.model.backbone.features_of([load_samples(data).read(0)]))
    assert identity_for("identity", other) == "identity:c,a,b"


def test_images_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="identity takes rows of numbers, but the data contains images"):
        simulate(RunConfig(backbone="identity"), "digits", out=tmp_path / "run")
    with pytest.raises(UserError, match="contains rows of numbers"):
        simulate(RunConfig(), write_table(tmp_path / "t.csv"), out=tmp_path / "run")
