import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from fedhead.data import UnreadableSampleError, read_image, to_image

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Image.Image:
    image.save(tmp_path / name, **options)  # type: ignore[arg-type]
    return read_image(tmp_path / name)


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    image = Image.fromarray(GREY > 100)
    assert image.mode == "1"
    read = saved(tmp_path, image, "x.png")
    assert read.mode == "L"
    assert np.array_equal(pixels(read), np.where(GREY > 100, 255, 0))


def test_palettes_become_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    read = saved(tmp_path, image, "x.png")
    assert read.mode == "RGB"
    assert pixels(read).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_transparency_is_composited_onto_white(tmp_path: Path) -> None:
    for colour, expected in (((200, 0, 0, 255), [200, 0, 0]), ((200, 0, 0, 0), [255] * 3), ((0, 0, 0, 51), [204] * 3)):
        read = saved(tmp_path, Image.new("RGBA", (1, 1), colour), "x.png")
        assert (read.mode, pixels(read)[0, 0].tolist()) == ("RGB", expected)
    grey = saved(tmp_path, Image.new("LA", (1, 1), (0, 51)), "x.png")
    assert (grey.mode, pixels(grey).tolist()) == ("L", [[204]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert pixels(saved(tmp_path, palette, "x.png", transparency=0)).tolist() == [[[255] * 3, [0, 0, 255]]]
    assert pixels(saved(tmp_path, palette, "x.gif", transparency=1)).tolist() == [[[255, 0, 0], [255] * 3]]
    keyed = saved(tmp_path, Image.fromarray(np.array([[7, 9]], np.uint8)), "x.png", transparency=7)
    assert (keyed.mode, pixels(keyed).tolist()) == ("L", [[255, 9]])
    premultiplied = Image.new("RGBA", (1, 1), (200, 0, 0, 255)).convert("RGBa")
    assert pixels(to_image(premultiplied, "x")).tolist() == [[[200, 0, 0]]]
    assert pixels(to_image(np.array([[[0, 0, 0, 51]]], np.uint8), "x")).tolist() == [[[204] * 3]]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_are_scaled_by_the_range_of_the_type(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    read = saved(tmp_path, Image.fromarray(values), name)
    assert read.mode == "L"
    assert pixels(read).tolist() == np.rint(values / 257).astype(int).tolist() == [[0, 0, 1, 1, 128, 255]]
    assert np.array_equal(pixels(to_image(values, "x")), pixels(read))


def test_big_endian_and_integer_and_float_tiffs(tmp_path: Path) -> None:
    big = Image.frombytes("I;16B", (2, 1), np.array([257, 65535], ">u2").tobytes())
    assert pixels(to_image(big, "x")).tolist() == [[1, 255]]
    whole = saved(tmp_path, Image.fromarray(np.array([[0, 257, 65535]], np.int32)), "x.tif")
    assert pixels(whole).tolist() == [[0, 1, 255]]
    floats = saved(tmp_path, Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), "x.tif")
    assert pixels(floats).tolist() == [[0, 51, 255]]
    for values, words in (
        (np.array([[-1, 5]], np.int32), "from -1 to 5"),
        (np.array([[0, 70000]], np.int32), "from 0 to 70000"),
        (np.array([[0, 200.0]], np.float32), "floats must be in 0..1"),
        (np.array([[0, np.nan]], np.float32), "not finite"),
    ):
        with pytest.raises(UnreadableSampleError, match=words):
            saved(tmp_path, Image.fromarray(values), "x.tif")


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_cmyk_and_ycbcr_become_rgb(tmp_path: Path, mode: str) -> None:
    colour = Image.new("RGB", (8, 8), (200, 40, 40)).convert(mode)
    name = "x.jpg" if mode == "YCbCr" else "x.tif"
    read = saved(tmp_path, colour, name)
    assert read.mode == "RGB"
    assert np.abs(pixels(read).astype(int) - [200, 40, 40]).max() <= 3


def test_adobe_cmyk_is_not_inverted(tmp_path: Path) -> None:
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert pixels(saved(tmp_path, white, "x.jpg")).min() >= 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_every_orientation_in_every_mode(tmp_path: Path, orientation: int, mode: str) -> None:
    upright = Image.fromarray(GREY[:5]) if mode != "I;16" else Image.fromarray(GREY[:5].astype(np.uint16) * 257)
    image = upright.convert(mode) if mode != "I;16" else upright
    inverse = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    turning = image.getexif()
    turning[0x0112] = inverse
    image.info["exif"] = turning.tobytes()
    lying = ImageOps.exif_transpose(image)
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = saved(tmp_path, lying, "x.png", exif=exif)
    assert read.size == (8, 5)
    assert np.array_equal(pixels(read.convert("L")), GREY[:5])


def test_first_of_several_frames_is_used(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
    for name in ("x.gif", "x.tif"):
        read = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert set(pixels(read.convert("L")).ravel()) == {10}


def test_booleans_and_channels_first(tmp_path: Path) -> None:
    assert pixels(to_image(np.array([[True, False]]), "x")).tolist() == [[255, 0]]
    four = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    assert np.array_equal(pixels(to_image(four, "x")), pixels(to_image(four.transpose(1, 2, 0), "x")))


def test_users_image_is_not_modified() -> None:
    image = Image.new("RGB", (2, 2))
    info = dict(image.info)
    assert to_image(image, "x") is image
    assert image.info == info


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp"])
def test_error_names_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(content, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"scan.{suffix}"
    path.write_bytes(content.getvalue()[: int(len(content.getvalue()) * share)])
    with pytest.raises(UnreadableSampleError, match=rf"scan\.{suffix} cannot be read as an image"):
        read_image(path)
