"""Segmentation runs end to end on drawn images with masks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate


def draw(folder: Path, count: int, seed: int = 0) -> str:
    """Write bright squares on dark noise with their masks, and return the data spec."""
    generator = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((64, 64), np.uint8)
        top, left = generator.integers(0, 32, 2)
        mask[top : top + 28, left : left + 28] = 255
        noise = generator.integers(0, 60, (64, 64, 3))
        pixels = (noise + (mask[..., None] > 0) * 150).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return f"masks:{folder / 'images'}?masks={folder / 'masks'}"


def run(data: str, out: Path, **changes: object) -> RunResult:
    values = {
        "task": "segmentation",
        "backbone": "torchvision:mobilenet_v2",
        "weights": "random",
        "layer": "features.1+features.2:map@64",
        "simulation": {"data": data, "sites": 3, "partition": "iid", "min_rows": 4, "min_class_count": 2},
    }
    return simulate(RunConfig(**{**values, **changes}), out=out)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("drawn"), 36)


def test_squares_are_found(drawn: str, tmp_path: Path) -> None:
    result = run(drawn, tmp_path / "run")
    assert result.evaluation.miou.value > 0.8
    assert result.model.classes == ("background", "foreground")
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").count("IoU by class") >= 1
    assert "segmentation" in (tmp_path / "run" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_secure_sums_give_the_same_head(drawn: str, tmp_path: Path) -> None:
    plain = run(drawn, tmp_path / "plain")
    masked = run(drawn, tmp_path / "masked", privacy={"secure_sum": True, "max_colluding": 0})
    difference = plain.model.head.weight - masked.model.head.weight
    assert float(difference.abs().max()) < 1e-4 * float(plain.model.head.weight.abs().max())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 3}, "set rounds to 0"),
        ({"lift": "relu:512"}, "takes no lift"),
        ({"personal": "closed"}, "Personal heads are for task"),
        ({"foreign": True}, "takes no foreign"),
        ({"worth": True}, "takes no worth"),
        ({"layer": "features.1"}, "choose layers with ':map'"),
        ({"privacy": {"epsilon": 1.0}}, "Differential privacy"),
        ({"head": "mlp:16"}, "takes no head"),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    drawn: str, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(drawn, tmp_path / "run", **changes)
