"""Preprocessing of clips, and `bundled:logmel`, features of their spectrogram that need no weights."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedhead.backbones.preprocessing import PROBES, Batch
from fedhead.data import Clip, Item, Kind
from fedhead.errors import UserError

logger = logging.getLogger(__name__)

RATE = 16_000
"""Sampling rate of `bundled:logmel` and its limits, in Hz."""

MAX_SECONDS = 30.0
"""Default limit of a clip's duration; the rest of a longer clip is not used."""

SHORTEST = 0.1
"""Duration in seconds to which shorter clips are padded with silence, since encoders need a few frames."""

WINDOW, HOP, BINS, BANDS = 400, 160, 512, 64
"""Of the spectrogram: samples per frame and between frames, samples of the Fourier transform, and mel bands."""

DECADES = 8.0
"""Dynamic range of the spectrogram below a clip's loudest value, in powers of ten."""

PARTS = 3
"""Number of equal parts of a clip with a mean each."""

_MOST_PARTS = 1000

Waveform = npt.NDArray[np.float32]

_warned: set[str] = set()


@dataclass(frozen=True)
class AudioPreprocessing:
    """Preprocessing of clips to waveforms at one rate, or to frames of a spectrogram.

    Attributes:
        rate: samples per second of the backbone's input.
        settings: values of JSON types that differ between any two different `extract`.
        extract: returns a waveform's input: samples `[length]`, or frames `[length, values + 1]` whose last value is 1
            for frames of the clip and 0 for padding; None returns the waveform itself.
        max_seconds: limit of the duration.
    """

    rate: int
    settings: Mapping[str, Any]
    extract: Callable[[Waveform], Tensor] | None = None
    max_seconds: float = MAX_SECONDS

    @property
    def kind(self) -> Kind:
        """Always "audio"."""
        return "audio"

    def __call__(self, item: Item) -> Tensor:
        """Return the input of a clip, float32 `[length]` or `[length, values + 1]`.

        Raises:
            UserError: for an item of another kind.
        """
        if not isinstance(item, Clip):
            raise UserError("This backbone takes clips of sound, but was given an item of another kind.")
        if item.seconds > self.max_seconds:
            self._warn(item.seconds)
        most = math.ceil(self.max_seconds * item.rate)
        waveform = resampled(item.samples[:most], item.rate, self.rate)[: int(self.max_seconds * self.rate)]
        missing = int(SHORTEST * self.rate) - len(waveform)
        waveform = np.pad(waveform, (0, missing)) if missing > 0 else waveform
        return torch.from_numpy(waveform) if self.extract is None else self.extract(waveform)

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return `clips` `[n, longest]` or `[n, longest, values + 1]`, padded by zeros, and `lengths` `[n]` int64."""
        return {
            "clips": nn.utils.rnn.pad_sequence(list(inputs), batch_first=True),
            "lengths": torch.tensor([len(one) for one in inputs]),
        }

    def probes(self) -> Sequence[Item]:
        """Return clips of different lengths: tones that rise, with noise."""
        random = np.random.default_rng(0)
        clips = []
        for row in range(PROBES):
            time = np.arange(int((0.7 + row) * self.rate)) / self.rate
            tones = 0.3 * np.sin(2 * np.pi * (200 + 300 * row + 400 * time) * time)
            clips.append(Clip((tones + 0.01 * random.standard_normal(len(time))).astype(np.float32), self.rate))
        return clips

    def describe(self) -> dict[str, Any]:
        """Return rate, limits and settings."""
        return {
            "rate": self.rate,
            "max_seconds": self.max_seconds,
            "shortest": SHORTEST,
            "resampling": "scipy.signal.resample_poly",
            **self.settings,
        }

    def _warn(self, seconds: float) -> None:
        """Warn of the first clip that is too long."""
        key = repr(self.describe())
        if key not in _warned:
            _warned.add(key)
            logger.warning(
                "A clip lasts %.0f s, but the backbone uses the first %g s of a clip; cut long clips into shorter "
                "ones. This is logged once.",
                seconds,
                self.max_seconds,
            )


def resampled(samples: Waveform, rate: int, target: int) -> Waveform:
    """Return samples at another rate, by a polyphase filter (`scipy.signal.resample_poly`, computed in float64).

    Args:
        samples: `[length]`.
        rate: of the samples, in Hz.
        target: in Hz; unusual ratios are approximated to 1e-6.
    """
    if rate == target:
        return samples
    from scipy.signal import resample_poly

    ratio = Fraction(target, rate).limit_denominator(_MOST_PARTS)
    changed: Waveform = resample_poly(samples.astype(np.float64), ratio.numerator, ratio.denominator).astype(np.float32)
    return changed


class LogMel(nn.Module):
    """Features `[n, (PARTS + 2) * BANDS]` of the log-mel spectrogram of waveforms.

    These are, for each band: the mean in each third of the clip, the deviation, and the deviation of the change from
    frame to frame. The mean of all bands and frames is subtracted first, so that the volume of a recording does not
    matter. The spectrogram is a convolution with windowed sines and cosines, which every runtime has.
    """

    waves: Tensor
    bands: Tensor

    def __init__(self) -> None:
        super().__init__()
        # These are constants, and so not part of the weights.
        self.register_buffer("waves", _waves(), persistent=False)
        self.register_buffer("bands", mel_bands(), persistent=False)

    def forward(self, clips: Tensor, lengths: Tensor) -> Tensor:
        """Return the features.

        Args:
            clips: `[n, longest]` at `RATE`, at least `WINDOW` long.
            lengths: `[n]`, the samples of each clip.
        """
        parts = nn.functional.conv1d(clips.unsqueeze(1), self.waves, stride=HOP)
        real, imaginary = parts.chunk(2, dim=1)
        power = torch.matmul((real.square() + imaginary.square()).transpose(1, 2), self.bands)
        levels = power.clamp_min(1e-10).log10()
        frames = ((lengths - WINDOW) // HOP + 1).clamp_min(1).unsqueeze(1)
        place = torch.arange(levels.shape[1], device=levels.device).unsqueeze(0)
        held = (place < frames).to(levels.dtype).unsqueeze(2)
        loudest = levels.where(held > 0, levels.new_tensor(-torch.inf)).amax((1, 2), keepdim=True)
        levels = torch.maximum(levels, loudest - DECADES)
        levels = levels - (levels * held).sum((1, 2), keepdim=True) / (held.sum((1, 2), keepdim=True) * BANDS)
        mean = _mean(levels, held)
        change = levels[:, 1:] - levels[:, :-1]
        found = [((levels - mean.unsqueeze(1)).square() * held).sum(1), (change.square() * held[:, 1:]).sum(1)]
        count = held.sum(1)
        deviations = [(one / count.clamp_min(1)).clamp_min(1e-12).sqrt() for one in found]
        means = []
        for part in range(PARTS):
            within = ((place * PARTS) // frames == part).to(levels.dtype).unsqueeze(2) * held
            means.append(torch.where(within.sum(1) > 0, _mean(levels, within), mean))
        return torch.cat([*means, *deviations], dim=1)


def logmel_preprocessing() -> AudioPreprocessing:
    """Return the preprocessing of `bundled:logmel`: waveforms at 16 kHz."""
    settings = {"window": WINDOW, "hop": HOP, "bins": BINS, "bands": BANDS, "decades": DECADES, "parts": PARTS}
    return AudioPreprocessing(RATE, {"logmel": settings})


def mel_bands(lowest: float = 20.0) -> Tensor:
    """Return triangular filters `[BINS / 2 + 1, BANDS]`, equally spaced in mel, up to half of `RATE`."""

    def mel(hertz: npt.NDArray[np.float64] | float) -> Any:
        return 2595 * np.log10(1 + np.asarray(hertz) / 700)

    edges = 700 * (10 ** (np.linspace(mel(lowest), mel(RATE / 2), BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, BINS // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


def _waves() -> Tensor:
    """Return the Hann-windowed cosines and sines `[BINS + 2, 1, WINDOW]` of the Fourier transform."""
    place = np.arange(WINDOW)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * place / WINDOW)
    phase = 2 * np.pi * np.arange(BINS // 2 + 1)[:, None] * place / BINS
    waves = np.concatenate([np.cos(phase), -np.sin(phase)]) * window
    return torch.from_numpy(waves.astype(np.float32)).unsqueeze(1)


def _mean(levels: Tensor, held: Tensor) -> Tensor:
    return (levels * held).sum(1) / held.sum(1).clamp_min(1)
