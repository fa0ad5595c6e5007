import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedhead.backbones import load_backbone
from fedhead.data import Samples, UnreadableSampleError, load_samples
from fedhead.features.blocks import Block, extract_blocks
from fedhead.features.store import FeatureStore
from fedhead.simulations import cluster
from fedhead.simulations.cluster_extraction import extract_on_ray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BLOCKS = [range(start, start + 5) for start in range(0, 40, 5)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray")
    with cluster.connected(""):
        yield module


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    generator = np.random.default_rng(0)
    for row in range(40):
        (tmp_path / "scans" / f"kind-{row % 2}").mkdir(parents=True, exist_ok=True)
        image = generator.integers(0, 256, (30, 20, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "scans" / f"kind-{row % 2}" / f"{row:02}.png")
    (tmp_path / "scans" / "kind-1" / "01.png").write_bytes(b"no image")
    return load_samples(f"folder:{tmp_path}/scans")


def assert_equal(made: list[Block], expected: list[Block]) -> None:
    assert [list(block.rows) for block in made] == [list(block.rows) for block in expected]
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one.features, other.features)
        np.testing.assert_array_equal(one.keys, other.keys)
        assert {row: str(error) for row, error in one.unreadable.items()} == {
            row: str(error) for row, error in other.unreadable.items()
        }


def test_workers_make_the_same_store(ray: Any, samples: Samples, tmp_path: Path) -> None:
    backbone = load_backbone("torchvision:squeezenet1_1", weights="random")
    done: list[int] = []
    here = list(extract_blocks(backbone, samples, BLOCKS))
    assert_equal(list(extract_on_ray(backbone, samples, BLOCKS, progress=done.append)), here)
    assert done == list(range(5, 41, 5))
    glyphnet = load_backbone("bundled:glyphnet")
    stores = [
        FeatureStore.open(glyphnet, samples, root=tmp_path / name, extract=extract)
        for name, extract in (("here", extract_blocks), ("ray", extract_on_ray))
    ]
    assert stores[0].digest == stores[1].digest
    assert len(stores[1].skipped) == 1


def test_blocks_of_a_lost_worker_are_made_here(ray: Any, samples: Samples, caplog: pytest.LogCaptureFixture) -> None:
    backbone = load_backbone("bundled:glyphnet")
    made = extract_on_ray(backbone, samples, BLOCKS)
    first = next(made)
    assert made.gi_frame is not None
    ray.kill(made.gi_frame.f_locals["workers"][0])
    assert_equal([first, *made], list(extract_blocks(backbone, samples, BLOCKS)))
    assert "of 8 blocks were extracted in this process" in caplog.text


def test_files_that_workers_do_not_see_are_read_here(
    ray: Any, samples: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    here, read = os.getpid(), samples.read

    def read_here(row: int) -> Any:
        if os.getpid() != here:
            raise UnreadableSampleError("there is no such file", lasting=False)
        return read(row)

    backbone = load_backbone("bundled:glyphnet")
    made = list(extract_on_ray(backbone, replace(samples, read=read_here), BLOCKS[:2]))
    assert_equal(made, list(extract_blocks(backbone, samples, BLOCKS[:2])))
    assert "2 of 2 blocks were extracted in this process" in caplog.text
