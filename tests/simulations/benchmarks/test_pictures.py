"""Data sets seen as other pictures."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fedhead.data import Clip, samples_from_arrays, samples_from_texts
from fedhead.data.boxes import Boxes
from fedhead.errors import UserError
from fedhead.simulations.benchmarks.pictures import cut_out, negative, spectrogram, spectrograms, spread


def test_negatives_are_grey_and_inverted() -> None:
    samples = samples_from_arrays(np.full((3, 4, 4, 3), 250, dtype=np.uint8), [0, 1, 0], classes=["a", "b"])
    image = negative(samples).read(1)
    assert isinstance(image, Image.Image)
    assert np.unique(np.asarray(image)).tolist() == [5]
    assert negative(samples).fingerprint != samples.fingerprint
    with pytest.raises(UserError, match="no images"):
        negative(samples_from_texts(["one", "two"], [0, 1], classes=["a", "b"]))


def test_rows_are_spread_over_the_data() -> None:
    samples = samples_from_arrays(
        np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), range(10)
    )
    few = spread(samples, 4)
    assert few.labels.tolist() == [0, 3, 6, 9]
    assert np.asarray(few.read(2)).max() == 6
    assert spread(samples, 0) is samples


def test_a_tone_is_a_line_at_its_height() -> None:
    rate = 8000
    wave = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    picture = np.asarray(spectrogram(Clip(wave, rate)))[..., 0]
    assert picture.shape == (32, 32)
    # A quarter of the highest tone, 4,000 Hz, from the bottom.
    assert picture.mean(1).argmax() == pytest.approx(24, abs=1)
    assert spectrogram(Clip(wave[:80], rate)).size == (32, 32)
    with pytest.raises(UserError, match="no sounds"):
        spectrograms(samples_from_texts(["one", "two"], [0, 1], classes=["a", "b"]))


def test_objects_are_cut_out_of_their_images() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[5:15, 10:20] = 200
    samples = samples_from_arrays(np.stack([image, image]), [0, 1], classes=["a", "b"])
    corners = np.array([[0.25, 0.25, 0.5, 0.75], [0.0, 0.0, 0.1, 0.1]])
    boxes = Boxes(corners, np.array([1, 0]), np.array([False, True]))
    drawn = replace(samples, annotated="boxes", annotation=lambda row: boxes)
    cut = cut_out(drawn)
    assert len(cut) == 2
    assert cut.labels.tolist() == [1, 1]
    assert cut.groups is not None
    assert len(set(cut.groups)) == 2
    piece = cut.read(1)
    assert isinstance(piece, Image.Image)
    assert piece.size == (12, 12)
    assert np.asarray(piece)[1:-1, 1:-1].min() == 200
    with pytest.raises(UserError, match="no boxes"):
        cut_out(samples)
