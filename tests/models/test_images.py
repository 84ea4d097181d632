"""Image files of every kind that people have, against the pixels they were made of, and those that cannot be read."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, WebPImagePlugin
from torchvision.transforms import v2

from models import images, predict
from models.data import DataError

pytestmark = pytest.mark.gate("torch")

RAMP = np.arange(0, 256, 5, dtype=np.uint8)[:48].reshape(6, 8)  # grey
NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def _read(path: Path) -> torch.Tensor:
    """In [0, 1], with no word on the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = images.read(path)
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


def _expected(colours: np.ndarray) -> torch.Tensor:
    """Of values from 0 to 255, grey (H, W) or colours (H, W, 3)."""
    values = torch.from_numpy(np.array(colours)).double() / 255
    return (values.expand(3, -1, -1) if values.dim() == 2 else values.permute(2, 0, 1)).float()


def _png(samples: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a sample; Pillow writes such files in grey only. ``kind``: 0 grey, 2 RGB, 4 LA, 6 RGBA."""
    height, width = samples.shape[:2]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _tiff(content: bytes, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """A TIFF of RAMP's size, grey; photometric 0: white is zero, 1: black is; format 1 unsigned, 2 signed, 3 floats."""
    tags = {256: 8, 257: 6, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 6, 279: len(content)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(content))
    return start + content + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def _saved(pixels: Any, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _twelve_bits() -> bytes:
    pairs = (np.round(RAMP * (4095 / 255)).astype(int)).reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())


WIDE = RAMP.astype(np.uint16) * 257
DEEP = {
    "png": _saved(WIDE, "PNG"),
    "pgm": _saved(WIDE, "PPM"),
    "pgm, maxval 1000": b"P5 8 6 1000\n" + np.round(RAMP * (1000 / 255)).astype(">u2").tobytes(),
    "tiff": _saved(WIDE, "TIFF"),
    "tiff, compressed": _saved(WIDE, "TIFF", compression="tiff_lzw"),
    "tiff, big-endian": _tiff(WIDE.astype(">u2").tobytes(), 16, order=">"),
    "tiff, white is zero": _tiff((65535 - WIDE).tobytes(), 16, photometric=0),
    "tiff, 12 bits": _tiff(_twelve_bits(), 12),
    "tiff, floats": _saved(RAMP.astype(np.float32) / 255, "TIFF"),
    "tiff, floats, white is zero": _tiff((1 - RAMP.astype(np.float32) / 255).tobytes(), 32, 0, 3),
    "pfm": _saved(RAMP.astype(np.float32) / 255, "PPM"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_more_than_8_bits(tmp_path: Path, kind: str) -> None:
    """The ramp that 8 bits hold; PIL's convert("RGB") clips it at 255, and knows neither 12 bits nor white as zero."""
    (tmp_path / "x").write_bytes(DEEP[kind])
    pixels = _read(tmp_path / "x")
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, _expected(RAMP), rtol=0, atol=5e-4)
    Image.fromarray(RAMP).save(tmp_path / "8.png")
    for size in (4, 16):
        deep, eight = predict.read(tmp_path / "x", size), predict.read(tmp_path / "8.png", size)
        torch.testing.assert_close(deep, eight, rtol=0, atol=5e-4)


def test_colours_of_16_bits(tmp_path: Path) -> None:
    """Of each sample the 8 high bits; an alpha of 16 bits counts."""
    wide = NOISE.astype(np.uint16) * 257
    opaque = np.full((6, 8, 1), 65535, np.uint16)
    for kind, samples, expected in (
        (2, wide, NOISE),
        (6, np.concatenate([wide, opaque], 2), NOISE),
        (6, np.concatenate([wide, opaque * 0], 2), np.full_like(NOISE, 255)),
        (4, np.concatenate([WIDE[..., None], opaque], 2), RAMP),
    ):
        (tmp_path / "x.png").write_bytes(_png(samples, kind))
        torch.testing.assert_close(_read(tmp_path / "x.png"), _expected(expected), rtol=0, atol=1 / 255)
    half = np.full((6, 8, 1), 32768, np.uint16)
    for samples, expected in (
        (wide, NOISE),
        (np.concatenate([wide, opaque], 2), NOISE),
        (np.concatenate([wide, half], 2), NOISE / 2 + 127.5),
    ):
        (tmp_path / "x.tif").write_bytes(_colour_tiff(samples, 1))
        torch.testing.assert_close(_read(tmp_path / "x.tif"), _expected(expected), rtol=0, atol=1.5 / 255)


def _colour_tiff(samples: np.ndarray, sample_format: int) -> bytes:
    """A TIFF of NOISE's size, RGB or RGBA, of samples of any width; format 1 unsigned, 3 floats."""
    content, channels, bits = samples.tobytes(), samples.shape[2], 8 * samples.itemsize
    lists = struct.pack(f"<{2 * channels}H", *[bits] * channels, *[sample_format] * channels)
    end = 8 + len(content)
    tags = {256: 8, 257: 6, 259: 1, 262: 2, 273: 8, 277: channels, 278: 6, 279: len(content), 284: 1}
    entries = {tag: struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()}
    entries[258] = struct.pack("<HHII", 258, 3, channels, end)
    entries[339] = struct.pack("<HHII", 339, 3, channels, end + 2 * channels)
    if channels == 4:
        entries[338] = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    whole = b"".join(entry for _, entry in sorted(entries.items()))
    start = b"II*\0" + struct.pack("<I", end + len(lists)) + content + lists
    return start + struct.pack("<H", len(entries)) + whole + bytes(4)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
TIFF = "is a TIFF that is damaged or of a kind that Pillow does not read: save it as PNG or JPEG"
UNREAD = {
    "floats of three colours": (_colour_tiff(NOISE.astype(np.float32) / 255, 3), TIFF),
    "floats of 16 bits": (_colour_tiff(NOISE.astype(np.float16) / 255, 3), TIFF),
    "colours of 32 bits": (_colour_tiff(NOISE.astype(np.uint32), 1), TIFF),
    "heic": (HEIC, "is a HEIC image that Pillow does not read: save it as PNG or JPEG"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_pillow_lacks_is_named(tmp_path: Path, kind: str) -> None:
    content, message = UNREAD[kind]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=f"^{tmp_path / 'x'} {message}"):
        _read(tmp_path / "x")


def test_a_pillow_without_a_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.webp").write_bytes(_saved(NOISE, "WEBP"))
    _read(tmp_path / "x.webp")
    monkeypatch.setattr(WebPImagePlugin, "SUPPORTED", False)
    with pytest.raises(DataError, match=r"is no image that can be read \(.*WEBP support not installed\)"):
        _read(tmp_path / "x.webp")


def _gradient(height: int, width: int) -> Image.Image:
    """Colours that change slowly: a smaller picture of them is much the same."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray(np.stack([x * 255, y * 255, (1 - x) * y * 255], 2).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_smaller(tmp_path: Path, mode: str) -> None:
    """Where it is said what they are for, with what is needed and twice that; turned as the tag says all the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.jpg"
    path.write_bytes(_saved(_gradient(480, 640).convert(mode), "JPEG", quality=95, exif=exif))
    assert images.read(path).shape == (3, 640, 480)
    for size, shape in ((240, (3, 640, 480)), (120, (3, 320, 240)), (60, (3, 160, 120)), (8, (3, 80, 60))):
        assert images.read(path, size).shape == shape
    whole = v2.functional.resize(images.read(path).float(), [24, 24], antialias=True)
    small = v2.functional.resize(images.read(path, 24).float(), [24, 24], antialias=True)
    torch.testing.assert_close(small, whole, rtol=0, atol=3)
    torch.testing.assert_close(predict.read(path, 24)[0], small / 255, rtol=0, atol=1e-6)
    assert (small - whole).abs().max() > 1e-3, "prediction decodes it smaller too"
    path.write_bytes(_saved(_gradient(480, 640), "PNG"))
    assert images.read(path, 8).shape == (3, 480, 640)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 x 20,000 pixels: a JPEG is read smaller, others are refused before their pixels are made."""
    Image.new("L", (20_000, 20_000)).save(tmp_path / "x.png", compress_level=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # and as much more for a JPEG of 640 x 480
    (tmp_path / "x.jpg").write_bytes(_saved(_gradient(480, 640), "JPEG"))
    assert images.read(tmp_path / "x.jpg", 8).shape == (3, 60, 80)
    monkeypatch.undo()
    with pytest.raises(
        DataError, match=r"x\.png is too large an image: of more than 178,956,970 pixels; scale it down"
    ):
        images.read(tmp_path / "x.png", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    for size in (None, 32):  # whole, or still 120 x 160
        with pytest.raises(DataError, match=r"x\.jpg is too large an image: of more than 5,000 pixels"):
            images.read(tmp_path / "x.jpg", size)


def test_images_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/x.JPG", "b/y.tiff", "a.webp", "z.heif", ".z.png", "notes.txt", "b/readme"):
        (tmp_path / name).touch()
    assert images.files(tmp_path) == [tmp_path / name for name in ("a.webp", "b/x.JPG", "b/y.tiff", "z.heif")]
    assert images.files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    assert images.files(tmp_path / "absent") == [tmp_path / "absent"]
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="c is a directory without images"):
        images.files(tmp_path / "c")


UNKNOWN = {
    "integers": (_saved(RAMP.astype(np.int32), "TIFF"), "32-bit integers"),
    "unsigned integers": (_tiff(WIDE.astype(np.uint32).tobytes(), 32), "32-bit integers"),
    "signed 16 bits": (_tiff(RAMP.astype(np.int16).tobytes(), 16, sample_format=2), "32-bit integers"),
    "floats to 255": (_saved(RAMP.astype(np.float32), "TIFF"), "values go from 0 to 235"),
    "negative floats": (_saved(-RAMP.astype(np.float32) / 255, "TIFF"), "values go from -0.9"),
    "nan": (_saved(np.full((6, 8), np.nan, np.float32), "TIFF"), "values go from nan"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_values_without_a_known_white_are_refused(tmp_path: Path, kind: str) -> None:
    content, message = UNKNOWN[kind]
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        images.read(tmp_path / "x.tif")
    assert str(tmp_path / "x.tif") in str(caught.value)


def test_modes(tmp_path: Path) -> None:
    """Grey, black and white, a palette, CMYK: the colours they were made of."""
    few = NOISE // 128 * 255
    dark = np.where(RAMP[..., None] > 100, np.uint8(255), np.uint8(0))[..., 0]
    colours = Image.fromarray(few)
    for content, expected in (
        (_saved(NOISE, "PNG"), NOISE),
        (_saved(RAMP, "PNG"), RAMP),
        (_saved(Image.fromarray(dark).convert("1"), "PNG"), dark),
        (_saved(Image.fromarray(dark).convert("1"), "TIFF", compression="group4"), dark),
        (_saved(colours.quantize(8), "PNG"), few),
        (_saved(colours.quantize(8), "GIF"), few),
        (_saved(colours.convert("CMYK"), "TIFF"), few),
        (_saved(_tiled(few).convert("CMYK"), "JPEG", quality=100), _tiled(few)),
        (_saved(255 - RAMP, "TIFF"), 255 - RAMP),
        (_tiff((255 - RAMP).tobytes(), 8, photometric=0), RAMP),
    ):
        (tmp_path / "x").write_bytes(content)
        torch.testing.assert_close(_read(tmp_path / "x"), _expected(np.asarray(expected)), rtol=0, atol=3 / 255)


def _tiled(colours: np.ndarray) -> Image.Image:
    """Each pixel as 16 x 16 ones, which JPEG keeps."""
    return Image.fromarray(colours.repeat(16, 0).repeat(16, 1))


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    """Not the colour that lies under it, which convert("RGB") shows; half transparent is half white."""
    alpha = np.array([[0, 255, 128, 255, 0, 255, 64, 255]] * 6, dtype=np.uint8)
    share = alpha[..., None] / 255

    def on_white(colours: np.ndarray) -> np.ndarray:
        return colours * share + 255 * (1 - share)

    grey = np.repeat(RAMP[..., None], 3, 2)
    for content, expected in (
        (_saved(np.dstack([NOISE, alpha]), "PNG"), on_white(NOISE)),
        (_saved(np.dstack([NOISE, alpha]), "WEBP", lossless=True, exact=True), on_white(NOISE)),
        (_saved(np.dstack([NOISE, alpha]), "TIFF"), on_white(NOISE)),
        (_saved(Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(alpha)]), "PNG"), on_white(grey)),
        # one colour, or one entry of the palette, stands for transparent
        (_saved(NOISE, "PNG", transparency=tuple(NOISE[2, 3].tolist())), _with(NOISE, (2, 3))),
        (_saved(RAMP, "PNG", transparency=int(RAMP[2, 3])), _with(grey, (2, 3))),
        (_saved(WIDE, "PNG", transparency=int(WIDE[2, 3])), _with(grey, (2, 3))),
        (_saved(_numbered(), "PNG", transparency=19), _with(NOISE, (2, 3))),
        (_saved(_numbered(), "GIF", transparency=19), _with(NOISE, (2, 3))),
        (_saved(_numbered(), "PNG", transparency=bytes([255] * 19 + [0] + [255] * 28)), _with(NOISE, (2, 3))),
    ):
        (tmp_path / "x").write_bytes(content)
        torch.testing.assert_close(_read(tmp_path / "x"), _expected(expected), rtol=0, atol=1 / 255)


def _with(colours: np.ndarray, white: tuple[int, int]) -> np.ndarray:
    changed = colours.copy()
    changed[white] = 255
    return changed


def _numbered() -> Image.Image:
    """NOISE by a palette of as many entries as it has pixels."""
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8), "L")
    image = image.convert("P")
    image.putpalette(NOISE.tobytes())
    return image


# what the tag says of a file's rows and columns: how to turn them for a viewer
TURNS = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.swapaxes(0, 1), 2), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("tag", TURNS)
def test_turned_as_the_tag_says(tmp_path: Path, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    for pixels, kind in (
        (NOISE, "PNG"),
        (NOISE, "TIFF"),
        (WIDE, "PNG"),
        (WIDE, "TIFF"),
        (RAMP, "TIFF"),
        (RAMP, "WEBP"),
    ):
        options = {"lossless": True} if kind == "WEBP" else {}
        (tmp_path / "x").write_bytes(_saved(pixels, kind, exif=exif, **options))
        expected = TURNS[tag](RAMP if pixels is WIDE else pixels)
        torch.testing.assert_close(_read(tmp_path / "x"), _expected(expected), rtol=0, atol=1e-6)
    (tmp_path / "x.jpg").write_bytes(_saved(_tiled(NOISE), "JPEG", quality=100, exif=exif))
    assert _read(tmp_path / "x.jpg").shape[1:] == ((128, 96) if tag >= 5 else (96, 128))


def test_first_of_several_pictures(tmp_path: Path) -> None:
    others = [Image.fromarray(255 - NOISE)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        first = _numbered() if kind == "GIF" else NOISE
        options = {"lossless": True} if kind == "WEBP" else {}
        (tmp_path / "x").write_bytes(_saved(first, kind, save_all=True, append_images=others, **options))
        assert torch.equal(_read(tmp_path / "x"), _expected(NOISE))


KINDS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, or with some bytes changed: pixels, or one line that names the file; nothing else is raised."""
    whole = _saved(_tiled(NOISE), kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12") if kind == "JPEG" else _saved(
        _tiled(NOISE).quantize(32) if kind == "GIF" else _tiled(NOISE), kind
    )  # fmt: skip
    path = tmp_path / "x"
    random = np.random.default_rng(0)
    refused: list[str] = []
    for i in range(60):
        content = bytearray(whole[: random.integers(len(whole))] if i % 2 else whole)
        for place in random.integers(min(len(content), 600), size=3) if i % 2 == 0 else ():
            content[place] = random.integers(256)
        path.write_bytes(content)
        try:
            _read(path)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) >= 25
    assert all(line.startswith(str(path)) for line in refused)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_file_is_said_to_be_truncated(tmp_path: Path, kind: str) -> None:
    whole = _saved(_tiled(NOISE), kind)
    (tmp_path / "x").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"^{tmp_path / 'x'} cannot be read: .*(?i:truncated)"):
        _read(tmp_path / "x")


def test_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, text, large = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "large.png"
    empty.write_bytes(b"")
    text.write_text("hello")
    Image.fromarray(NOISE).save(large)
    cases = [
        (empty, "is empty"),
        (text, "is no image"),
        (tmp_path, "is no file"),
        (tmp_path / "absent", "No such file"),
    ]
    if hasattr(os, "mkfifo"):  # to open it would wait for ever
        os.mkfifo(tmp_path / "pipe")
        cases.append((tmp_path / "pipe", "is no file"))
    for path, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            images.read(path)
        assert str(path) in str(caught.value)
    # Pillow warns of a large picture, and refuses one of twice that size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert torch.equal(_read(large), _expected(NOISE))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match="too large an image"):
        images.read(large)
