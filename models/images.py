"""Image files as people have them: colours of 8 bits or grey of more, with a palette, transparent, turned by a tag."""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data import DataError

WHITE_IS_ZERO, BITS = 262, 258  # tags of TIFF files


# what people have and Pillow does not read, by bytes from a place on
UNREAD = [(0, start, "a TIFF that is damaged or of a kind") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")]
UNREAD += [(4, b"ftyp" + brand, "a HEIC image") for brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")]


@functools.cache
def _endings() -> tuple[str, ...]:
    """Of the names of images, in small letters."""
    from PIL import Image

    found = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return *found, ".heic", ".heif"  # Pillow does not read these two, which is to be said


def below(path: Path, leave_out: Callable[[Path], bool] = lambda directory: False) -> list[Path]:
    """The images in a directory and those below it, by their names' endings, in order. Hidden files and directories are
    other programs' notes; a directory to which several links lead, or that lies in itself by one, is entered once."""
    found, entered = [], set()
    for directory, folders, names in os.walk(path, followlinks=True):
        here = os.path.realpath(directory)
        folders[:] = sorted(name for name in folders if name[0] != "." and not leave_out(Path(directory, name)))
        if here in entered:
            folders.clear()
            continue
        entered.add(here)
        found += [Path(directory, name) for name in names if name[0] != "." and name.lower().endswith(_endings())]
    return sorted(found)


def files(path: Path) -> list[Path]:
    """The images in a directory and those below it, in order; else the path itself.

    Raises DataError for a directory without images.
    """
    if not path.is_dir():
        return [path]
    found = below(path)
    if not found:
        raise DataError(f"{path} is a directory without images")
    return found


def read(path: Path, size: int | None = None) -> Tensor:
    """An image file as a viewer shows it on white paper: (3, H, W), uint8 or, of a deeper grey, float32 in [0, 1].

    Turned as its EXIF tag says; of several pictures the first. Where ``size`` says what its sides are to become, a JPEG
    of more than twice that comes at a half, a quarter or an eighth of its size, which is faster to decode. Raises
    DataError where it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file")
    content = b""
    try:
        with warnings.catch_warnings(record=True) as said:  # of damaged tags, and of large pictures below the limit
            warnings.simplefilter("always")
            # from memory: a file that Pillow maps into it, a grey TIFF, is not turned by its tag, or twice
            content = path.read_bytes()
            with _open(content, size) as image:
                return _pixels(image)
    except UnidentifiedImageError as error:
        lacking = [str(w.message) for w in said if "support" in str(w.message)]  # of a Pillow built without a library
        raise DataError(f"{path} {_what_it_is(content, lacking)}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{path} is too large an image: of more than {most:,} pixels; scale it down first") from error
    except OSError as error:  # of the system, or of a decoder: truncated, broken
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # arbitrary bytes make decoders raise arbitrary exceptions
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}") from error


def _open(content: bytes, size: int | None) -> Any:
    from PIL import Image, JpegImagePlugin

    if content.startswith(b"RIFF") and len(content) < 8 + int.from_bytes(content[4:8], "little"):
        raise OSError("image file is truncated")  # a WebP, of which its decoder says less
    try:
        image: Any = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        if size is None or not content.startswith(b"\xff\xd8"):
            raise
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))
    if size is not None:
        image.draft(None, (2 * size, 2 * size))
    if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    return image


def _what_it_is(content: bytes, lacking: list[str]) -> str:
    if not content:
        return "is empty"
    for place, start, kind in UNREAD:
        if content.startswith(start, place):
            return f"is {kind} that Pillow does not read: save it as PNG or JPEG"
    return f"is no image that can be read{''.join(f' ({text})' for text in lacking)}"


def _pixels(image: Any) -> Tensor:
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:  # convert("RGB") would show the colours that lie under what is transparent
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    return pil_to_tensor(image.convert("RGB"))


def _deep(image: Any) -> Tensor:
    """Grey of more than 8 bits, which convert("RGB") would clip at 255: float32, white is 1."""
    from PIL import ImageOps

    tags = getattr(image, "tag_v2", {})
    grey = np.asarray(ImageOps.exif_transpose(image))
    values = grey.astype(np.float32)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # a NaN is neither
            raise ValueError(
                f"its values go from {values.min():g} to {values.max():g}, those of floats must be in [0, 1]"
            )
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two have 16 bits, whatever the mode
        raise ValueError("which of its 32-bit integers is white is not known; save it with 8 or 16 bits")
    else:
        values /= 2 ** tags.get(BITS, (16,))[0] - 1
    if tags.get(WHITE_IS_ZERO) == 0:  # Pillow inverts grey of 8 bits only
        values = 1 - values
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[grey == transparent] = 1
    return torch.from_numpy(values).expand(3, -1, -1)
