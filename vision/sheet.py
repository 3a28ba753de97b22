"""PNG files, and a contact sheet: pictures in rows, each above its caption.

Letters: H W height and width.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
FONT = 13
"""Height of captions, in pixels."""


def write_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write uint8 [H, W, 3]."""
    Image.fromarray(image_HWC).save(path, format="PNG")


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 4, side: int = 192
) -> np.ndarray:
    """One picture, uint8 [H, W, 3], of pictures uint8 [H, W, 3] of any sizes.

    Small ones are enlarged without smoothing: their pixels stay visible.
    """
    columns = max(1, min(columns, len(images)))
    font = ImageFont.load_default(FONT)
    wrapped = [textwrap.wrap(caption, max(8, side // 7)) for caption in captions]
    height = side + MARGIN + max((len(lines) for lines in wrapped), default=0) * (FONT + 3)
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (side + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left = MARGIN + number % columns * (side + MARGIN)
        top = MARGIN + number // columns * (height + MARGIN)
        picture = Image.fromarray(image)
        small = max(picture.size) < side
        way = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(picture.resize(size, way), (left, top))
        for line, text in enumerate(lines):
            pen.text((left, top + side + 3 + line * (FONT + 3)), text, "black", font)
    return np.asarray(sheet)
