"""Image files of every usual kind become RGB, those that cannot are told why, and random changes are what they say."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from slicefine import SliceFineError
from slicefine.training.images import check_image, dark, drawn, read_image

LEVELS = np.linspace(0, 255, 20 * 30).astype(np.uint8).reshape(20, 30)


def saved(image: Image.Image, path: Path, **settings: object) -> Path:
    image.save(path, **settings)
    return path


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[("L", "png"), ("L", "jpg"), ("1", "png"), ("P", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png")],
        *[("RGBA", "webp"), ("CMYK", "jpg"), ("CMYK", "tiff"), ("YCbCr", "jpg"), ("RGB", "png"), ("RGB", "ppm")],
    ],
)
def test_every_usual_kind_becomes_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    original = Image.fromarray(np.stack([LEVELS, LEVELS // 2, 255 - LEVELS], -1))
    path = saved(original.convert(mode), tmp_path / f"a.{suffix}")
    found = read_image(path)
    assert (found.mode, found.size) == ("RGB", (30, 20))
    expected = original.convert(mode).convert("RGB") if mode in ("L", "1", "LA", "P") else original
    assert np.abs(pixels(found) - pixels(expected)).mean() < 9  # compression and palettes take something
    assert pixels(read_image(path.read_bytes())).tolist() == pixels(found).tolist()


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    wide = Image.fromarray(LEVELS.astype(np.uint16) * 257)
    assert wide.mode.startswith("I;16")
    found = pixels(read_image(saved(wide, tmp_path / "a.png")))
    assert found.tolist() == np.stack([LEVELS] * 3, -1).tolist()


@pytest.mark.parametrize("bits", [8, 12, 14, 15, 16])
def test_numbers_of_fewer_bits_in_sixteen_are_dark_and_this_is_said(bits: int, tmp_path: Path) -> None:
    largest: list[int] = []
    for number in range(2):
        levels = LEVELS.astype(np.uint16) * 257 >> (16 - bits)
        path = saved(Image.fromarray(levels), tmp_path / f"{number}.png")
        assert check_image(path, largest) is None
        assert pixels(read_image(path)).max() == (2**bits - 1) >> 8
    assert largest == [2**bits - 1] * 2
    notes = dark(largest)
    assert len(notes) == (bits < 15)
    if notes:
        assert f"The largest value in 2 images of 16 bits is {2**bits - 1} of 65535, which makes them dark" in notes[0]
        assert f"fewer bits ({bits}, say)" in notes[0]


def test_images_of_eight_bits_are_not_called_dark(tmp_path: Path) -> None:
    largest: list[int] = []
    assert check_image(saved(picture("red", 0), tmp_path / "a.png"), largest) is None
    assert largest == dark(largest) == []


def test_a_palette_with_transparency_says_nothing(tmp_path: Path) -> None:
    palette = picture("red", 0).convert("P")
    path = saved(palette, tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).mode == "RGB"


@pytest.mark.parametrize("wide", [False, True], ids=["jpeg", "16-bit png"])
def test_it_stands_upright_as_its_exif_says(wide: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image = Image.fromarray(LEVELS.astype(np.uint16) * 257) if wide else Image.fromarray(LEVELS).convert("RGB")
    found = read_image(saved(image, tmp_path / ("a.png" if wide else "a.jpg"), exif=exif))
    assert found.size == (20, 30)
    assert np.abs(pixels(found)[:, :, 0] - np.rot90(LEVELS, -1).astype(int)).mean() < 3


def bomb() -> bytes:
    """A PNG of a few bytes that announces more pixels than Pillow takes."""
    made = io.BytesIO()
    Image.new("1", (1, 1)).save(made, "PNG")
    content = bytearray(made.getvalue())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "there is no such file", id="missing"),
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"<html>not found</html>", "it is not an image that Pillow can read", id="not an image"),
        pytest.param("half a jpeg", "it is damaged or cut short (", id="truncated JPEG"),
        pytest.param("half a png", "it is damaged or cut short (", id="truncated PNG"),
        pytest.param(bomb(), "pixels, so many that Pillow takes it for an attack", id="decompression bomb"),
        pytest.param("floats", "its pixels are 32-bit numbers (Pillow's mode F)", id="floats"),
    ],
)
def test_what_cannot_be_read_says_why(content: bytes | str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    if content == "floats":
        saved(Image.fromarray(LEVELS.astype(np.float32)), path, format="TIFF")
    elif isinstance(content, str):
        whole = saved(picture("red", 0, (200, 200)), path, format=content.rpartition(" ")[2].upper()).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content is not None:
        path.write_bytes(content)
    problem = check_image(path)
    assert problem is not None
    assert said in problem
    assert problem.endswith((".", ". "))
    if path.exists():
        assert check_image(path.read_bytes()) == problem
    with pytest.raises(SliceFineError):
        read_image(path)


def test_between_one_and_two_times_the_limit_is_too_much_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(picture("red", 0), tmp_path / "a.png")
    assert check_image(path) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 24 * 2 // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `media.read` does: Pillow only warns of these
        assert "more than 480 pixels" in (check_image(path) or "")


# ---------------------------------------------------------------- augmentation


def changed(names: list[str] | None, seed: int, image: Image.Image) -> Image.Image:
    return drawn(names, random.Random(seed))(image)


def test_nothing_is_changed_unasked() -> None:
    image = picture("red", 0)
    assert changed(None, 0, image) is image
    assert changed([], 0, image) is image


def test_flip_swaps_left_and_right_half_of_the_time() -> None:
    image = Image.fromarray(LEVELS).convert("RGB")
    found = [pixels(changed(["flip"], seed, image)) for seed in range(200)]
    flipped = [bool((one == pixels(image)[:, ::-1]).all()) for one in found]
    assert all(flip or (one == pixels(image)).all() for flip, one in zip(flipped, found, strict=True))
    assert 80 < sum(flipped) < 120


def test_crop_takes_a_rectangle_of_the_area_it_says() -> None:
    ramp = np.stack([*np.meshgrid(np.arange(60), np.arange(40)), np.zeros((40, 60))], -1).astype(np.uint8)
    shares, shapes = [], set()
    for seed in range(300):
        one = pixels(changed(["crop"], seed, Image.fromarray(ramp)))
        top, left = one[0, 0, 1], one[0, 0, 0]
        assert one.tolist() == ramp[top : top + one.shape[0], left : left + one.shape[1]].tolist()
        shares.append(one.shape[0] * one.shape[1] / (40 * 60))
        shapes.add(one.shape)
    assert 0.07 < min(shares) < 0.15
    assert 0.85 < max(shares) <= 1
    assert len(shapes) > 100


def test_color_changes_colors_and_no_place() -> None:
    image = picture("green", 0)
    means = [pixels(changed(["color"], seed, image)).mean() / pixels(image).mean() for seed in range(100)]
    assert min(means) < 0.75
    assert max(means) > 1.2
    assert changed(["color"], 0, image).size == image.size


@pytest.mark.parametrize("names", [["crop"], ["flip"], ["color"], ["crop", "flip", "color"]])
def test_the_same_numbers_give_the_same_change(names: list[str]) -> None:
    image = picture("red", 0, (60, 40))
    one = [pixels(changed(names, seed, image)).tolist() for seed in range(5)]
    assert one == [pixels(changed(names[::-1], seed, image)).tolist() for seed in range(5)]
    assert any(first != one[0] for first in one[1:])
    change = drawn(names, random.Random(1))
    assert pixels(change(image)).tolist() == pixels(change(image)).tolist() == one[1]  # all frames of a clip alike


def test_one_pixel_can_be_changed() -> None:
    for seed in range(20):
        assert changed(["crop", "flip", "color"], seed, Image.new("RGB", (1, 1))).size == (1, 1)
