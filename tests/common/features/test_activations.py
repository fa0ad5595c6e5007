"""Activations that are computed again for each batch, against those that are stored."""

import logging
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.split import split
from fedhead.data import Samples, load_samples
from fedhead.errors import FedheadError
from fedhead.features.activations import Recomputed, open_activations, stored_bytes, time_recomputing
from fedhead.features.boundary import BoundaryStore, number_for
from fedhead.tuning import parse_tune

from ..backbones.test_hf import saved_text_model

ROWS = 30
Usage = namedtuple("Usage", "total used free")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Backbone, Samples]:
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.arange(ROWS) % 2)
    return load_backbone("bundled:glyphnet"), load_samples(f"npz:{tmp_path / 'pictures.npz'}")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Backbone, Samples]:
    words = ["pain", "cough", "fever", "a", "the", "in"]
    chosen = np.random.default_rng(0).integers(1, 8, ROWS)
    lines = ["text,label", *(f"{' '.join(words[:count])},{row % 2}" for row, count in enumerate(chosen))]
    (tmp_path / "notes.csv").write_text("\n".join(lines))
    return load_backbone(f"hf:{saved_text_model(tmp_path / 'model', 'bert')}"), load_samples(
        f"csv:{tmp_path / 'notes.csv'}?text=text"
    )


@pytest.mark.parametrize("kind", ["pictures", "texts"])
@pytest.mark.parametrize("number", ["float16", "float32"])
def test_recomputed_activations_are_the_stored_ones(
    kind: str, number: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    backbone, samples = request.getfixturevalue(kind)
    trunk, tail = split(backbone, parse_tune("last:1"))
    store = BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path, number=number)  # type: ignore[arg-type]
    again = Recomputed.of(trunk, tail, samples, number)  # type: ignore[arg-type]
    assert (again.sequences, again.device) == (store.sequences, store.device)
    for rows in ([3, 0, 3, 29, 7], [11], list(range(ROWS))):
        one, other = again.take(np.array(rows)), store.take(np.array(rows))
        # A last bit of float16 is 1e-3 of a value.
        torch.testing.assert_close(one, other, rtol=2e-3 if number == "float16" else 1e-4, atol=1e-5)


def test_the_size_of_a_store_is_known_before(
    pictures: tuple[Backbone, Samples], texts: tuple[Backbone, Samples], tmp_path: Path
) -> None:
    for backbone, samples in (pictures, texts):
        trunk, tail = split(backbone, parse_tune("last:1"))
        store = BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path)
        assert stored_bytes(trunk, samples, np.arange(ROWS), number_for(trunk, tail)) == pytest.approx(
            store.num_bytes, rel=0.01
        )


def test_a_small_disk_is_spared(
    pictures: tuple[Backbone, Samples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone, samples = pictures
    trunk, tail = split(backbone, parse_tune("last:1"))
    rows, root = np.arange(ROWS), tmp_path / "not" / "there"
    needed = stored_bytes(trunk, samples, rows, number_for(trunk, tail))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * needed, needed, needed + 10))
    with caplog.at_level(logging.INFO):
        made = open_activations(trunk, tail, samples, rows, root=root)
    assert isinstance(made, Recomputed)
    assert "computed again for each batch" in caplog.text and f"Activations of {ROWS} rows" in caplog.text
    assert not root.exists()
    assert isinstance(open_activations(trunk, tail, samples, rows, "store", root=root), BoundaryStore)
    # What is stored already needs no room.
    assert isinstance(open_activations(trunk, tail, samples, rows, root=root), BoundaryStore)
    monkeypatch.undo()
    assert isinstance(open_activations(trunk, tail, samples, rows, root=tmp_path / "other"), BoundaryStore)
    assert isinstance(open_activations(trunk, tail, samples, rows, "recompute", root=root), Recomputed)


def test_rows_that_can_no_longer_be_read_end_the_round(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    samples = load_samples(f"folder:{folder}")
    trunk, tail = split(load_backbone("bundled:glyphnet"), parse_tune("last:1"))
    made = Recomputed.of(trunk, tail, samples)
    assert len(made.take(np.arange(4))) == 4
    (folder / "b" / "1.png").write_bytes(b"no picture")
    with pytest.raises(FedheadError, match="It could be read before"):
        made.take(np.arange(4))


def test_the_time_of_the_frozen_layers_is_that_of_a_row(pictures: tuple[Backbone, Samples]) -> None:
    trunk, _ = split(pictures[0], parse_tune("last:1"))
    assert 0 < time_recomputing(trunk) < 10
