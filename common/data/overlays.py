"""Drawings of masks: as palette images, and laid over the images that they belong to."""

import colorsys

import numpy as np
import numpy.typing as npt
from PIL import Image

Mask = npt.NDArray[np.uint8]

OPACITY = 0.45
_GOLDEN_ANGLE = 0.381966


def palette(classes: int = 256) -> npt.NDArray[np.uint8]:
    """Return a colour for each class `[n, 3]`: black for the first, and hues far from each other for the others."""
    hues = [(0.58 + number * _GOLDEN_ANGLE) % 1 for number in range(classes - 1)]
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(hue, 0.8, 1.0) for hue in hues)]
    rounded: npt.NDArray[np.uint8] = np.rint(np.array(colours) * 255).astype(np.uint8)
    return rounded


def mask_image(mask: Mask) -> Image.Image:
    """Return a mask of class numbers as an image of mode P, whose pixels are the class numbers."""
    image = Image.fromarray(mask, mode="L").convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette(palette().ravel().tolist())
    return image


def overlay(image: Image.Image, mask: Mask) -> Image.Image:
    """Return an image with each class but the first in its colour, and the outlines of classes."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    colours = palette()[mask].astype(np.float64)
    inside = mask > 0
    pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * colours[inside]
    edge = np.zeros_like(inside)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    pixels[edge] = np.maximum(colours[edge], 230 * (~inside[edge])[:, None])
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
