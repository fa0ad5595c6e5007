import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from fedhead.data import load_samples
from fedhead.errors import UserError


def save_mnist(root: Path, rows: int = 7, seed: int = 0) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Write images and labels in the format of the original files."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (rows, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, rows, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(rows, dtype=np.uint8) % 10
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, rows) + labels.tobytes())
        images = images[::-1]
    return images


def test_data_set_in_a_local_folder(tmp_path: Path) -> None:
    images = save_mnist(tmp_path)
    samples = load_samples(f"torchvision:MNIST?root={tmp_path}&split=train")
    assert (len(samples), samples.classes[3]) == (7, "3 - three")
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(samples)).read(2)), images[2])
    test = load_samples(f"torchvision:MNIST?root={tmp_path}&split=test")
    assert np.array_equal(np.asarray(test.read(0)), images[6])
    assert test.fingerprint != samples.fingerprint == load_samples(samples.spec).fingerprint
    save_mnist(tmp_path, rows=8)
    assert load_samples(samples.spec).fingerprint != samples.fingerprint


def test_data_set_without_files() -> None:
    samples = load_samples("torchvision:FakeData?size=9&image_size=(3,8,6)&num_classes=4")
    assert (len(samples), samples.read(0).size) == (9, (6, 8))  # type: ignore[union-attr]
    assert set(samples.classes) <= set("0123")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchvision:MNISTT?root=x", "Did you mean 'MNIST'"),
        ("torchvision:MNIST", "needs its folder, as in torchvision:MNIST.root=data"),
        ("torchvision:MNIST?root={0}", "cannot be loaded: .*root={0}&download=yes"),
        ("torchvision:MNIST?root={0}&split=val", "has no split 'val'"),
        ("torchvision:MNIST?rot={0}", "takes no option 'rot'. Did you mean 'root'"),
        ("torchvision:MNIST?root={0}&transform=x", "takes no option 'transform'"),
        ("torchvision:FakeData?size=many", "FakeData cannot be loaded"),
    ],
)
def test_invalid_data_sets_are_rejected(tmp_path: Path, spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words.format(tmp_path)):
        load_samples(spec.format(tmp_path))
