import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.audio import BANDS, BINS, HOP, PARTS, RATE, WINDOW, LogMel, mel_bands, resampled
from fedhead.backbones.catalogue import describe
from fedhead.data import Clip, require_kind
from fedhead.errors import UserError


def sweep(seconds: float, rate: int = RATE, low: float = 200.0, volume: float = 0.3) -> Clip:
    time = np.arange(int(seconds * rate)) / rate
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(time))
    return Clip((volume * (np.sin(2 * np.pi * (low + 400 * time) * time) + noise)).astype(np.float32), rate)


def test_features_of_a_clip_do_not_depend_on_its_batch_or_volume() -> None:
    backbone = load_backbone("bundled:logmel")
    clips = [sweep(0.05), sweep(0.4), sweep(3.0), sweep(1.1, volume=0.1)]
    together = backbone.features_of(clips)
    assert together.shape == (4, (PARTS + 2) * BANDS)
    alone = torch.cat([backbone.features_of([clip]) for clip in clips])
    assert (together - alone).abs().max() < 1e-5
    louder = backbone.features_of([sweep(1.1, volume=0.4)])
    assert (together[3:] - louder).abs().max() < 1e-4


def test_the_spectrogram_is_that_of_a_fourier_transform() -> None:
    samples = torch.from_numpy(sweep(0.7).samples)
    frames = samples.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(frames, BINS).abs().square() @ mel_bands()
    levels = power.clamp_min(1e-10).log10()
    levels = torch.maximum(levels, levels.max() - 8)
    levels = levels - levels.mean()
    features = LogMel()(samples.unsqueeze(0), torch.tensor([len(samples)]))[0]
    thirds = torch.arange(len(levels)) * PARTS // len(levels)
    expected = [levels[thirds == part].mean(0) for part in range(PARTS)]
    expected += [levels.std(0, correction=0), levels.diff(dim=0).square().sum(0).div(len(levels)).sqrt()]
    assert (features - torch.cat(expected)).abs().max() < 1e-3


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 44_101, 48_000])
def test_a_tone_is_the_same_at_any_rate(rate: int) -> None:
    def tone(one: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(one) / one).astype(np.float32)

    changed = resampled(tone(rate), rate, RATE)
    assert abs(len(changed) - RATE) <= 1
    middle = slice(2000, 14_000)
    assert np.abs(changed[middle] - tone(RATE)[middle]).max() < (5e-3 if rate != 44_101 else 2e-2)


def test_the_rest_of_a_long_clip_is_not_used_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    preprocessing = load_backbone("bundled:logmel").preprocessing
    long = sweep(31.0)
    with caplog.at_level(logging.WARNING):
        tensor = preprocessing(long)
    assert torch.equal(tensor, torch.from_numpy(long.samples[: 30 * RATE]))
    assert "lasts 31 s, but the backbone uses the first 30 s" in caplog.text


def test_it_is_saved_described_and_refuses_other_items() -> None:
    backbone = load_backbone("bundled:logmel")
    assert backbone.num_parameters == 0
    assert (backbone.kind, describe("bundled:logmel", "penultimate", ()).num_features) == ("audio", 320)
    with pytest.raises(UserError, match="takes clips of sound"):
        backbone.features_of(["a text"])
    with pytest.raises(UserError, match=r"takes images, but the data contains clips\. Use a backbone of sounds"):
        require_kind("bundled:glyphnet", "image", "audio")


def test_a_saved_one_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "logmel.safetensors"
    backbone = load_backbone("bundled:logmel")
    backbone.save(path)
    assert Backbone.load(path).digest == backbone.digest
