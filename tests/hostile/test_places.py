"""A coordinator that chooses so coarse a grid that a class's sums rest on one image."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedhead.backbones import load_backbone
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.flower import in_process_identity
from fedhead.protocol.messages import Manifest

from .test_backbones import chunks

IMAGES, SIDE = 40, 64
ALONE = 7


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


def draw(folder: Path) -> str:
    """Write images with a large box of one class over a small one of another, which is alone in one image only."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    content: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 0, "name": "cell"}, {"id": 1, "name": "rare"}],
    }
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        boxes = [(0, [1, 1, 62, 62])] if number != ALONE else []
        boxes += [(1, [28, 30, 4, 4])] if number < 20 else []
        for category, sides in boxes:
            content["annotations"].append({"image_id": number, "category_id": category, "bbox": sides})
    (folder / "instances.json").write_text(json.dumps(content))
    return f"coco:{folder / 'instances.json'}?images={folder / 'images'}"


def test_a_class_whose_boxes_lose_their_cells_but_in_one_image_has_no_sums(tmp_path: Path) -> None:
    backbone = load_backbone("torchvision:squeezenet1_1", weights="random", layer="features.12:map@64")
    assert backbone.geometry is not None
    assert backbone.geometry.grid == (3, 3)
    accepted = AcceptedBackbones(frozenset({backbone.spec}))
    site = LocalSite("ward", draw(tmp_path), "cpu", guard=Guard(5, 20), backbones=accepted)
    manifest = Manifest.of("run", RunConfig(task="detection", rounds=0), backbone, ("cell", "rare"))
    for chunk in chunks(backbone.to_bytes(), 10**6):
        site.install(manifest, chunk)
    holding = site.open(manifest)
    assert holding.data.places is not None
    stats = holding.task.statistics(backbone.num_features)
    rows = np.concatenate([holding.train.rows, holding.held_out.rows])
    holding.data.places.add(stats, holding.data.features, rows)
    assert stats.items == IMAGES - 1
    assert stats.counts[0] > 0
    assert stats.counts[1] == 0
