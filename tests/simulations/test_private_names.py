"""Private runs on texts, whose classes' names are near their rows."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.backbones import load_backbone
from fedhead.config import RunConfig
from fedhead.server.private_run import named_features
from fedhead.simulations import simulate

CLASSES = ("lung_cough", "skin-rash", "heart rate", "sore throat")
FILLERS = ("and", "a", "with", "today", "since", "some")
ROWS, WIDTH = 400, 48


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = [*" ".join(CLASSES).replace("_", " ").replace("-", " ").split(), *FILLERS]
    lines = (" ".join([word, *(f"{value:.3f}" for value in rng.normal(size=WIDTH))]) for word in words)
    (tmp_path / "vectors.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "vectors.txt"


def notes(path: Path, classes: tuple[str, ...]) -> str:
    draw = random.Random(0)
    rows = ["text,label"]
    for row in range(ROWS):
        words = CLASSES[row % 4].replace("_", " ").replace("-", " ").split()
        text = [draw.choice(words), *draw.sample(FILLERS, 3), f"{row}"]
        rows.append(f"{' '.join(text)},{classes[row % 4]}")
    path.write_text("\n".join(rows) + "\n")
    return f"csv:{path}"


def test_names_are_read_as_texts(vectors: Path) -> None:
    backbone = load_backbone(f"vectors:{vectors}")
    names = named_features(backbone, CLASSES)
    assert names is not None
    torch.testing.assert_close(names.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(names, named_features(backbone, [name.replace("_", "-") for name in CLASSES]))  # type: ignore[arg-type]
    assert named_features(load_backbone("bundled:glyphnet"), CLASSES) is None


@pytest.mark.parametrize(("rounds", "epsilon"), [(0, 0.5), (20, 1.5)])
def test_private_heads_of_few_texts_rest_on_names(rounds: int, epsilon: float, vectors: Path, tmp_path: Path) -> None:
    found = {}
    for kind, classes in (("names", CLASSES), ("numbers", ("0", "1", "2", "3"))):
        data = notes(tmp_path / f"{kind}.csv", classes)
        config = RunConfig.from_values(
            {"backbone": f"vectors:{vectors}", "rounds": rounds, "privacy": {"epsilon": epsilon}, "seed": 1}
        )
        result = simulate(config, data, [range(0, ROWS, 2), range(1, ROWS, 2)], test_data=data, out=tmp_path / kind)
        assert result.test_accuracy is not None
        found[kind] = (result.outcome.privacy["names"], result.test_accuracy)
        said = "near the classes&#39; names" in (tmp_path / kind / "report.html").read_text()
        assert said == result.outcome.privacy["names"]
    assert found["names"][0]
    assert not found["numbers"][0]
    assert found["names"][1] > 0.7
