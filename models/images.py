"""Image files as people have them: colours of 8 bits or grey of more, with a palette, transparent, turned by a tag."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data import DataError

WHITE_IS_ZERO, BITS = 262, 258  # tags of TIFF files


def read(path: Path) -> Tensor:
    """An image file as a viewer shows it on white paper: (3, H, W), uint8 or, of a deeper grey, float32 in [0, 1].

    Turned as its EXIF tag says; of several pictures the first. Raises DataError where it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, and of large pictures below the limit
            # from memory: a file that Pillow maps into it, a grey TIFF, is not turned by its tag, or twice
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                return _pixels(image)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no image that can be read") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large an image: {error}") from error
    except OSError as error:  # of the system, or of a decoder: truncated, broken
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # arbitrary bytes make decoders raise arbitrary exceptions
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}") from error


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
