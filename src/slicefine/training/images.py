"""Images: files of any usual kind to RGB, what is wrong with those that cannot be, and random changes for training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from slicefine.errors import SliceFineError, first_line
from slicefine.training.media import opened
from slicefine.training.media_sources import Item, Kind

IMAGES = Kind(
    "image",
    "Image",
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
    ),
)  # fmt: skip
LARGEST = "largest value"
"""What `Image.info` of an image that had 16 bits says more."""
WHITE = 65_535
AGAIN = "Copy or download it again, or remove it"
LEAST_AREA, MOST_ASPECT, JITTER = 0.08, 4 / 3, 0.4
"""Of a random crop and of random colors; as torchvision's RandomResizedCrop, and as ColorJitter is mostly used."""


def read_image(item: Item) -> Image.Image:
    """The image as RGB, upright as its EXIF says; of an animation the first picture.

    Sixteen bits of grey become eight; transparency is dropped, as in torchvision.

    Raises `SliceFineError` for what is missing, empty, cut short, no image, too large, or has numbers without a known range. The
    message is the rest of a sentence that begins with the place of the image.
    """
    try:
        with Image.open(opened(item)) as image:
            width, height = image.size
            if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(_to_rgb(image))
    except Image.DecompressionBombError as error:
        raise SliceFineError(
            f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, so many that Pillow takes it for an attack. Make it smaller."
        ) from error
    except SliceFineError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's readers raise
        raise SliceFineError(_why(item, error)) from error


def check_image(item: Item, largest: list[int] | None = None) -> str | None:
    """What is wrong with an image, found by decoding all of it; None if nothing is.

    The largest value of an image of 16 bits is added to the list `largest`, if there is one.
    """
    try:
        image = read_image(item)
    except SliceFineError as error:
        return str(error)
    if largest is not None and LARGEST in image.info:
        largest.append(image.info[LARGEST])
    return None


def dark(largest: list[int]) -> list[str]:
    """A note if images of 16 bits, of which these are the largest values, hold numbers of fewer bits."""
    most = max(largest, default=WHITE)
    if most > WHITE / 4:
        return []
    return [
        f"The largest value in {len(largest)} images of 16 bits is {most} of {WHITE}, which makes them dark ({most >> 8} of 255): white is "
        f"{WHITE}, whatever an image holds. If they were recorded with fewer bits ({most.bit_length()}, say), multiply them."
    ]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        image.load()
        levels = np.asarray(image)
        made = Image.fromarray((levels >> 8).astype(np.uint8))
        made.info |= image.info | {LARGEST: int(levels.max())}  # EXIF among it
        return made.convert("RGB")
    if image.mode in ("I", "F"):
        raise SliceFineError(
            f"its pixels are 32-bit numbers (Pillow's mode {image.mode}), of which no range is agreed on. Save it with 8 or 16 bits."
        )
    if image.mode in ("P", "PA"):  # a palette with transparency goes through RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def _why(item: Item, error: Exception) -> str:
    size = len(item) if isinstance(item, bytes) else item.stat().st_size if item.is_file() else None
    if size is None:
        return f"there is no such file. {AGAIN}."
    if size == 0:
        return f"it is empty. {AGAIN}."
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image that Pillow can read. Save it as PNG or JPEG, or remove it."
    return f"it is damaged or cut short ({first_line(error)}). {AGAIN}."


# ---------------------------------------------------------------- augmentation

Change = Callable[[Image.Image], Image.Image]


def drawn(names: list[str] | None, draw: random.Random) -> Change:
    """One random change, made of those that `names` lists, in the order crop, flip, color; the same for every image it is given.

    - `crop`: a rectangle of 8 to 100 % of the area, its sides in a ratio of 3:4 to 4:3 to each other; the processor resizes it;
    - `flip`: left and right swapped, in half of all cases;
    - `color`: brightness, contrast and saturation times 0.6 to 1.4.
    """
    makers: dict[str, Callable[[random.Random], Change]] = {"crop": _crop, "flip": _flip, "color": _color}
    changes = [maker(draw) for name, maker in makers.items() if name in (names or [])]

    def change(image: Image.Image) -> Image.Image:
        for step in changes:
            image = step(image)
        return image

    return change


def _crop(draw: random.Random) -> Change:
    area, aspect = draw.uniform(LEAST_AREA, 1), math.exp(draw.uniform(-1, 1) * math.log(MOST_ASPECT))
    left, top = draw.random(), draw.random()

    def crop(image: Image.Image) -> Image.Image:
        pixels = area * image.width * image.height
        width = min(image.width, max(1, round(math.sqrt(pixels * aspect))))
        height = min(image.height, max(1, round(math.sqrt(pixels / aspect))))
        x, y = round(left * (image.width - width)), round(top * (image.height - height))
        return image.crop((x, y, x + width, y + height))

    return crop


def _flip(draw: random.Random) -> Change:
    return ImageOps.mirror if draw.random() < 0.5 else lambda image: image


def _color(draw: random.Random) -> Change:
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [draw.uniform(1 - JITTER, 1 + JITTER) for _ in kinds]

    def color(image: Image.Image) -> Image.Image:
        for kind, factor in zip(kinds, factors, strict=True):
            image = kind(image).enhance(factor)
        return image

    return color
