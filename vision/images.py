"""Image files as arrays: read with suspicion, counted by what was found, prepared as published.

Whatever a folder holds, reading it ends with a list of what was wrong, not with an exception: a
file that is no image is named and left out; one that is an image of an unusual kind is read, and
counted.

Letters: H W height and width, S side of a square.
"""

import collections
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Images with more are refused before they are decoded: a file of a few bytes may claim them."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What files may be. Of the other kinds that Pillow knows, some run a program to be decoded."""
LONGEST = 8
"""Sides of a picture to draw: the long one in short ones; the ends of a longer picture would be
cut off anyway, once they had been scaled up."""
MAX_BYTES = 256 << 20
"""Files with more are refused unread."""
MIN_SIDE = 14
"""Pixels of the short side at least, after scaling (published code)."""
GREY = 127
"""Value of every channel where a picture is padded to a square."""
SHOWN = 5
"""Names of files that a report gives for each kind."""


class ImageError(ValueError):
    """A file that cannot be used; `kind` says why, in a word or two to count by."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Findings:
    """What was found while reading files: kinds, how many, and the first names."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count a file of a kind."""
        self.counts[kind] += 1
        names = self.names.setdefault(kind, [])
        if len(names) < SHOWN:
            names.append(name)

    def report(self) -> list[str]:
        """A line for every kind."""
        lines = []
        for kind, count in sorted(self.counts.items()):
            names = ", ".join(self.names[kind])
            more = f" and {count - len(self.names[kind])} more" * (count > len(self.names[kind]))
            lines.append(f"{count} x {kind}: {names}{more}")
        return lines


def read_image(path: Path, findings: Findings | None = None) -> np.ndarray:
    """An image as uint8 [H, W, 3].

    EXIF rotation is undone, transparency is laid on white, CMYK, palettes and 16-bit greys become
    RGB, and of an animation the first frame is taken; `findings` counts these. ImageError for what
    is missing, empty, none of FORMATS, broken, or claims more than MAX_PIXELS.
    """
    findings, name = findings or Findings(), str(path)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if 0 < size <= MAX_BYTES else b""
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise ImageError("unreadable", f"{name!r}: {why}") from None
    if not size:
        raise ImageError("empty", f"{name} has no bytes")
    if size > MAX_BYTES:
        raise ImageError("too large", f"{name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    try:
        # Pillow's own limit is a warning first; ours is below it and always an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(io.BytesIO(content), name, findings)
    except UnidentifiedImageError:
        raise ImageError("no image", f"{name} is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too large", f"{name}: {error}") from None
    except ImageError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # decoders raise whatever they meet: OSError, struct.error, ...
        kind = type(error).__name__
        raise ImageError("broken", f"{name} cannot be decoded ({kind}: {error})") from None


def _decode(content: io.BytesIO, name: str, findings: Findings) -> np.ndarray:
    with Image.open(content, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                "too large",
                f"{name} claims {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded",
            )
        if getattr(image, "n_frames", 1) > 1:
            findings.add("animated (first frame taken)", name)
        image.load()
        turned = ImageOps.exif_transpose(image)
        if turned.size != image.size or image.getexif().get(0x0112, 1) != 1:
            findings.add("rotated by EXIF (turned upright)", name)
        return np.asarray(_as_rgb(turned, name, findings), np.uint8)


def _as_rgb(image: Image.Image, name: str, findings: Findings) -> Image.Image:
    """The same picture in RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        findings.add(f"mode {image.mode} (scaled to 8 bits)", name)
        values = np.asarray(image, np.float64)
        largest = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-9)
        grey = np.clip(values / largest * 255, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        findings.add("alpha (laid on white)", name)
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    if image.mode != "L":
        findings.add(f"mode {image.mode} (made RGB)", name)
    return image.convert("RGB")


def prepare_to_read(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """What the encoder reads, float32 [3, S, S]: long side scaled to `side`, grey around, -1 .. 1.

    Mean and deviation 0.5, as the grey of 127 implies (the report does not say).
    """
    height, width = image_HWC.shape[:2]
    scale, least = side / max(height, width), min(MIN_SIDE, side)
    size = (max(round(width * scale), least), max(round(height * scale), least))
    scaled = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))
    square = np.full((side, side, 3), GREY, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = scaled
    return _normed(square)


def prepare_to_draw(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """What the image tokenizer encodes, float32 [3, S, S]: short side scaled to `side`, the middle
    cut out, -1 .. 1."""
    most = LONGEST * min(image_HWC.shape[:2])
    top, left = (max(size - most, 0) // 2 for size in image_HWC.shape[:2])
    image_HWC = image_HWC[top : top + most, left : left + most]
    height, width = image_HWC.shape[:2]
    scale = side / min(height, width)
    size = (max(round(width * scale), side), max(round(height * scale), side))
    scaled = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return _normed(scaled[top : top + side, left : left + side])


def _normed(image_HWC: np.ndarray) -> np.ndarray:
    return np.moveaxis((image_HWC.astype(np.float32) / 255 - 0.5) / 0.5, -1, 0)


def to_bytes(pixels_CHW: np.ndarray) -> np.ndarray:
    """Decoded pixels, about -1 .. 1, as uint8 [H, W, 3]."""
    scaled = np.clip((np.moveaxis(pixels_CHW, 0, -1) + 1) / 2 * 255, 0, 255)
    return scaled.astype(np.uint8)
