from pathlib import Path

import pytest
import torch

from fedhead.backbones import load_backbone
from fedhead.data import load_samples
from fedhead.simulations.benchmarks import extraction
from fedhead.simulations.benchmarks.extraction import measure, write_photographs, write_texts
from fedhead.simulations.benchmarks.measurement import OURS


def test_the_store_is_measured_against_the_plain_loop_over_real_files(tmp_path: Path) -> None:
    write_photographs(tmp_path, 5)
    backbone = load_backbone("torchvision:squeezenet1_1", weights="random")
    measured = measure(backbone, load_samples(f"folder:{tmp_path}"), 1)
    assert measured.ratio.keys() == measured.seconds.keys() - {OURS}
    assert measured.setting["rows"] == 5


def test_texts_are_measured_with_the_padding_of_their_order(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.csv", 40)
    samples = load_samples(f"csv:{tmp_path}/texts.csv?text=text&label=label")
    assert (len(samples), samples.kind) == (40, "text")
    lengths = [len(str(samples.read(row)).split()) for row in range(40)]
    assert min(lengths) >= 4
    assert max(lengths) > 2 * min(lengths)


def test_other_features_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs(tmp_path, 2)
    monkeypatch.setattr(extraction, "plain_loop", lambda backbone, samples: torch.ones(2, backbone.num_features))
    with pytest.raises(RuntimeError, match="differ"):
        measure(load_backbone("bundled:pixels"), load_samples(f"folder:{tmp_path}"), 1)
