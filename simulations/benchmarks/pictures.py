"""Data sets seen as other pictures: fewer rows, grey negatives, spectrograms of sounds, and objects cut out."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from fedhead.data import Clip, Item, Samples
from fedhead.errors import UserError

SIDE = 32
"""Pixels of a spectrogram along each side."""
WINDOW = 256
"""Samples of each window of a spectrogram; windows overlap by half."""
MARGIN = 0.1
"""Surroundings of an object on each side, as a share of its size."""


def negative(samples: Samples) -> Samples:
    """Return grey negatives of photographs, which a backbone pretrained on photographs has not seen.

    Raises:
        UserError: if `samples` are not images.
    """
    if samples.kind != "image":
        raise UserError(f"{samples.spec} holds no images, so there are no negatives of them; leave --negative out.")
    return replace(
        samples,
        read=lambda row: ImageOps.invert(_image(samples.read(row)).convert("L")).convert("RGB"),
        spec=f"{samples.spec} (grey negatives)",
        fingerprint=f"{samples.fingerprint} negative",
        former=None,
    )


def spectrograms(samples: Samples) -> Samples:
    """Return grey pictures of sounds: the logarithm of the magnitudes of their first second, low tones at the bottom.

    Raises:
        UserError: if `samples` are not sounds.
    """
    if samples.kind != "audio":
        raise UserError(f"{samples.spec} holds no sounds, so there are no spectrograms; leave --spectrograms out.")

    def read(row: int) -> Item:
        clip = samples.read(row)
        assert isinstance(clip, Clip)
        return spectrogram(clip)

    return replace(
        samples,
        read=read,
        kind="image",
        spec=f"{samples.spec} (spectrograms)",
        fingerprint=f"{samples.fingerprint} spectrograms",
        former=None,
    )


def spectrogram(clip: Clip) -> Image.Image:
    """Return the picture of a clip; shorter ones are padded with silence on both sides."""
    samples = torch.from_numpy(clip.samples[: clip.rate])
    missing = max(clip.rate - len(samples), 0)
    padded = functional.pad(samples, (missing // 2, missing - missing // 2))
    window = torch.hann_window(WINDOW)
    levels = torch.stft(padded, WINDOW, WINDOW // 2, window=window, return_complex=True).abs().add(1e-3).log()
    small = functional.interpolate(levels[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0].flip(0)
    shares = (small - small.min()) / (small.max() - small.min()).clamp_min(1e-6)
    return Image.fromarray((255 * shares).byte().numpy()).convert("RGB")


def cut_out(samples: Samples) -> Samples:
    """Return the annotated objects of images, each a row of its own; rows of one image are a group.

    Raises:
        UserError: if `samples` have no boxes.
    """
    if samples.annotated != "boxes" or samples.annotation is None:
        raise UserError(f"{samples.spec} has no boxes, so no objects can be cut out; leave --cut-out out.")
    every = [samples.annotation(row) for row in range(len(samples))]
    found = [(row, at) for row, boxes in enumerate(every) for at in np.flatnonzero(~boxes.ignored).tolist()]

    def read(place: int) -> Item:
        row, at = found[place]
        image = _image(samples.read(row)).convert("RGB")
        left, top, right, bottom = every[row].corners[at] * (2 * image.size)
        across, down = MARGIN * (right - left), MARGIN * (bottom - top)
        return image.crop((round(left - across), round(top - down), round(right + across), round(bottom + down)))

    return replace(
        samples,
        labels=np.array([every[row].labels[at] for row, at in found], np.int64),
        read=read,
        name=lambda place: f"{samples.name(found[place][0])}, object {found[place][1]}",
        spec=f"{samples.spec} (cut out)",
        fingerprint=f"{samples.fingerprint} cut out",
        groups=[samples.name(row) for row, _ in found],
        sites=None,
        splits=None,
        annotation=None,
        annotated="",
        former=None,
    )


def spread(samples: Samples, rows: int) -> Samples:
    """Return `rows` rows, spread evenly over the data; all of them for 0."""
    if not 0 < rows < len(samples):
        return samples
    chosen = np.linspace(0, len(samples) - 1, rows).astype(np.int64)
    return replace(
        samples,
        labels=samples.labels[chosen],
        read=lambda row: samples.read(int(chosen[row])),
        name=lambda row: samples.name(int(chosen[row])),
        fingerprint=f"{samples.fingerprint} {rows} rows",
        groups=None if samples.groups is None else [samples.groups[row] for row in chosen],
        sites=None if samples.sites is None else [samples.sites[row] for row in chosen],
        splits=None if samples.splits is None else [samples.splits[row] for row in chosen],
        former=None,
    )


def _image(item: Item) -> Image.Image:
    return item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))
