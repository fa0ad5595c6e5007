"""Drawings of boxes on the images in which they were found."""

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw

_GOLDEN_ANGLE = 0.381966


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], titles: Sequence[str], kinds: Sequence[int]
) -> Image.Image:
    """Return an image with boxes and their titles.

    Args:
        image: of mode L or RGB.
        boxes: left, top, width and height of each in pixels.
        titles: of each.
        kinds: the number of each one's colour.
    """
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(max(image.size) / 400))
    for (left, top, wide, high), title, kind in zip(boxes, titles, kinds, strict=True):
        colour = _colour(kind)
        pen.rectangle([left, top, left + wide, top + high], outline=colour, width=width)
        edge = pen.textbbox((left, top), title)
        pen.rectangle(edge, fill=colour)
        pen.text((left, top), title, fill=(0, 0, 0))
    return drawn


def _colour(kind: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((0.58 + kind * _GOLDEN_ANGLE) % 1, 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
