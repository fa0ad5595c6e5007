"""Letters in many faces, drawn with deformations as images to train the bundled backbone on."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from fedhead.backbones.glyphnet import INPUT_SIZE
from fedhead.errors import UserError

LATIN_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LATIN = LATIN_CAPITALS + LATIN_CAPITALS.lower()
GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρστυφχψως"
CYRILLIC = "АБВГДЕЖЗИКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдежзиклмнопрстуфхцчшщъыьэюя"
ARMENIAN = "".join(map(chr, [*range(0x531, 0x557), *range(0x561, 0x587)]))
GEORGIAN = "".join(map(chr, range(0x10D0, 0x10F1)))
HEBREW = "".join(map(chr, range(0x5D0, 0x5EB)))

LOOK_ALIKES = {
    "0": "Oo\u039f\u03bf\u041e\u043e\u0555\u0585\u10d8\u05e1",
    "1": "Il\u0399\u05d5\u05df\u05d9",
    "2": "\u0577",
    "3": "\u0417\u0437\u10d5",
    "6": "\u0431\u10dc",
    "8": "\u0551",
}
"""Letters that could pass for a digit, which are never drawn."""

ALPHABET = "".join(
    letter
    for letter in LATIN + GREEK + CYRILLIC + ARMENIAN + GEORGIAN + HEBREW
    if letter not in "".join(LOOK_ALIKES.values())
)

STYLED = ("MATHEMATICAL ", "SCRIPT ", "BLACK-LETTER ", "DOUBLE-STRUCK ")
"""How Unicode begins the names of letters in another style, which are drawn as further forms of the letter."""

FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmsy10", "cmti10", "cmtt10"),
)

CELL = 64
"""Rows and columns of a glyph's distance fields; the glyph's longer side is `BOX` of them."""
BOX = 48
REACH = 12
"""Distances are measured up to here, in cells: farther than any pen is thick."""
CHUNK = 64
"""Glyphs worked on at once."""
PAGE = 32
"""Rows and columns of the bitmap that a glyph is drawn on before it is reduced to a grid."""


@dataclass(frozen=True)
class GlyphBank:
    """Every glyph as two fields of distances, which any pen can draw at any thickness.

    Attributes:
        pen: `[g, 64, 64]`, the distance to the glyph's skeleton, in cells.
        outline: `[g, 64, 64]`, the distance to the glyph's edge, negative inside.
        labels: `[g]`, each glyph's class.
        classes: the letters of each class: those that look the same in the first face, brought to one size.
    """

    pen: Tensor
    outline: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @classmethod
    def build(cls, faces: Sequence[str] = FACES) -> Self:
        """Draw every letter of the alphabet in every face that has it.

        Raises:
            UserError: if matplotlib is not installed.
        """
        drawn = [(face, letter, mask) for face in faces for letter, mask in _glyphs(face)]
        masks = torch.stack([mask for _, _, mask in drawn])
        first = {letter: mask for face, letter, mask in reversed(drawn) if face == faces[0]}
        letters = sorted({letter for _, letter, _ in drawn})
        classes = _merge_alike(letters, first)
        label_of = {letter: label for label, alike in enumerate(classes) for letter in alike}
        return cls(
            pen=_distance(thin(masks)),
            outline=_distance(masks) - _distance(~masks),
            labels=torch.tensor([label_of[letter] for _, letter, _ in drawn]),
            classes=tuple(classes),
        )

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `[count]` row numbers: every class as often as any other, so every glyph of a class."""
        sizes = torch.bincount(self.labels)
        starts = sizes.cumsum(0) - sizes
        chosen = torch.randint(len(self.classes), (count,), generator=generator)
        within = (torch.rand(count, generator=generator) * sizes[chosen]).long()
        return self.labels.argsort(stable=True)[starts[chosen] + within]


def _glyphs(face: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the letters that `face` has, each with its mask `[64, 64]`, several times if in several styles."""
    try:
        import matplotlib as mpl
        from matplotlib.ft2font import FT2Font
    except ImportError:
        raise UserError("Pretraining draws with the faces that matplotlib ships: pip install 'fedhead[dev]'.") from None
    path = str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf")
    font = ImageFont.truetype(path, 2 * BOX, layout_engine=ImageFont.Layout.BASIC)
    for character in map(chr, sorted(FT2Font(path).get_charmap())):
        letter = letter_of(character, face)
        if letter:
            yield letter, _mask(font, character)


def letter_of(character: str, face: str) -> str:
    """Return the letter of the alphabet that `character` is drawn as in `face`, or nothing."""
    if face.startswith("cm"):  # TeX's own encodings, which agree with Unicode on these only
        return character if character in ALPHABET and character in _tex_letters(face) else ""
    if unicodedata.name(character, "").startswith(STYLED):
        plain = unicodedata.normalize("NFKC", character)
        return plain if plain in ALPHABET else ""
    return character if character in ALPHABET else ""


def _tex_letters(face: str) -> str:
    return LATIN_CAPITALS if face == "cmsy10" else LATIN


def _mask(font: ImageFont.FreeTypeFont, character: str) -> Tensor:
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    page = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(page).text((4 - left, 4 - top), character, fill=255, font=font)
    page = page.crop(page.getbbox())
    scale = BOX / max(page.size)
    width, height = (max(2, round(side * scale)) for side in page.size)
    page = page.resize((width, height), Image.Resampling.BOX)
    mask = torch.zeros(CELL, CELL, dtype=torch.bool)
    y, x = (CELL - height) // 2, (CELL - width) // 2
    mask[y : y + height, x : x + width] = torch.from_numpy(np.array(page) > 127)
    return mask


def _merge_alike(letters: list[str], masks: dict[str, Tensor], threshold: float = 0.9) -> list[str]:
    """Group letters whose masks share at least `threshold` of their union, as A of three scripts do."""
    classes: list[str] = []
    for letter in letters:
        mine = masks.get(letter)
        for position, alike in enumerate(classes):
            theirs = masks.get(alike[0])
            if mine is None or theirs is None:
                continue
            if (mine & theirs).sum() >= threshold * (mine | theirs).sum():
                classes[position] += letter
                break
        else:
            classes.append(letter)
    return classes


def thin(masks: Tensor) -> Tensor:
    """Return the skeletons of masks `[g, h, w]`, one cell wide (Zhang & Suen, 1984)."""
    return torch.cat([_thin(part) for part in torch.split(masks, CHUNK)])


def _thin(masks: Tensor) -> Tensor:
    while True:
        before = masks
        for second in (False, True):
            around = _neighbours(masks)
            count = around.sum(0, dtype=torch.uint8)
            starts = (~around & around.roll(-1, 0)).sum(0, dtype=torch.uint8)
            north, east, south, west = around[0::2]
            inside = north & west & (east | south) if second else east & south & (north | west)
            masks = masks & ~((count >= 2) & (count <= 6) & (starts == 1) & ~inside)
        if torch.equal(masks, before):
            return masks


def _neighbours(masks: Tensor) -> Tensor:
    """Return `[8, g, h, w]`: the cells to the north, north-east, and on around."""
    height, width = masks.shape[1:]
    padded = functional.pad(masks, (1, 1, 1, 1))
    steps = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))
    return torch.stack([padded[:, y : y + height, x : x + width] for y, x in steps])


def _distance(masks: Tensor) -> Tensor:
    """Return each cell's Euclidean distance to the nearest cell of its mask, or `REACH` if it is farther."""
    return torch.cat([_square_distance(part).sqrt() for part in torch.split(masks, CHUNK)])


def _square_distance(masks: Tensor) -> Tensor:
    """Compute it along rows, then along columns (Felzenszwalb & Huttenlocher, 2012)."""
    squares = torch.where(masks, 0.0, float(REACH**2))
    for axis in (1, 2):
        margin = [0, 0, REACH, REACH] if axis == 1 else [REACH, REACH]
        padded = functional.pad(squares, margin, value=float(REACH**2))
        for step in range(-REACH, REACH + 1):
            squares = torch.minimum(squares, padded.narrow(axis, REACH + step, CELL) + float(step**2))
    return squares


def draw(bank: GlyphBank, rows: Tensor, generator: torch.Generator, sides: Sequence[int] | None = None) -> Tensor:
    """Draw glyphs, deformed, as a network is given them.

    Args:
        bank: the glyphs.
        rows: `[n]`, which of them.
        generator: where every deformation comes from.
        sides: the grids that equal parts of the batch, in order, are reduced to. By default half of it is
            reduced to 8 x 8 and the rest to four sizes from 9 to 28.

    Returns:
        Grey levels `[n, 1, 16, 16]` in `[0, 1]`, bright strokes on black.
    """
    if sides is None:
        sides = [8] * 4 + torch.randint(9, 29, (4,), generator=generator).tolist()
    ink = _ink(bank, rows, generator)
    grids = [_reduce(part, side, generator) for part, side in zip(ink.tensor_split(len(sides)), sides, strict=True)]
    return torch.cat(grids)


def _ink(bank: GlyphBank, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return pages `[n, 1, 32, 32]` with one glyph each, by pen or in its outline, bent and of any thickness."""
    n = len(rows)

    def between(low: float, high: float) -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low

    def around(centre: float, deviation: float) -> Tensor:
        return torch.randn(n, 1, 1, 1, generator=generator) * deviation + centre

    with_pen = between(0, 1) < 0.7
    field = torch.where(with_pen, bank.pen[rows, None], bank.outline[rows, None])

    tall = BOX / CELL / between(0.75, 1.04)
    wide = tall / around(-0.2, 0.22).exp()
    angle, slant = around(0, 0.13), around(0, 0.25)
    across = [wide * (angle.cos() + slant * angle.sin()), wide * (slant * angle.cos() - angle.sin())]
    down = [tall * angle.sin(), tall * angle.cos()]
    affine = torch.cat(
        [
            torch.cat([*across, between(-0.08, 0.08)], dim=3),
            torch.cat([*down, between(-0.06, 0.06)], dim=3),
        ],
        dim=2,
    )
    where = functional.affine_grid(affine.squeeze(1), [n, 1, PAGE, PAGE], align_corners=False)
    bends = torch.randn(n, 2, 4, 4, generator=generator) * between(0.02, 0.11)
    bends = functional.interpolate(bends, size=PAGE, mode="bicubic", align_corners=True)
    where = where + bends.permute(0, 2, 3, 1)

    distance = functional.grid_sample(field, where, padding_mode="border", align_corners=False)
    distance = distance * (PAGE / CELL) / (wide * tall).sqrt()
    thickness = torch.where(with_pen, between(1.0, 3.0), between(-0.3, 1.3))
    tremble = torch.randn(n, 1, 6, 6, generator=generator) * between(0, 0.35)
    thickness = thickness + functional.interpolate(tremble, size=PAGE, mode="bilinear", align_corners=True)
    return torch.sigmoid(3 * (thickness - distance))


def _reduce(ink: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Average pages over a `side` x `side` grid, vary contrast and noise, round, and resize as inputs are."""
    n = len(ink)
    grid = functional.interpolate(ink, size=side, mode="area")
    grid = grid * (torch.rand(n, 1, 1, 1, generator=generator) * 0.4 + 0.75)
    deviation = torch.rand(n, 1, 1, 1, generator=generator) * 0.08
    grid = grid + torch.randn(grid.shape, generator=generator) * deviation
    grid = grid.clamp(0, 1).mul(16).round() / 16
    return functional.interpolate(grid, size=INPUT_SIZE, mode="bilinear", antialias=True, align_corners=False)
