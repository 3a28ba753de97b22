"""Image files of every kind: what is read, what is refused, and what is said of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_janus_training import MODEL
from vision.config import EncoderConfig, ImageTraining, JanusConfig, TokenizerConfig
from vision.images import (
    GREY,
    MAX_PIXELS,
    Findings,
    ImageError,
    prepare_to_draw,
    prepare_to_read,
    read_image,
    to_bytes,
)
from vision.records import FileSource, Record, read_records
from vision.sheet import contact_sheet, write_png


def picture(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_a_plain_file_is_its_pixels(tmp_path):
    findings = Findings()
    file = saved(tmp_path / "a.png", Image.fromarray(picture()))
    np.testing.assert_array_equal(read_image(file, findings), picture())
    assert not findings.counts


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"not an image at all", "no image"),
        (b"GIF89a", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),  # runs Ghostscript
        (png(np.zeros((64, 64, 3), np.uint8))[:60], "broken"),
        (bomb(), "too large"),
        (None, "unreadable"),
    ],
)
def test_what_is_no_image_is_refused_by_name(tmp_path, content, kind):
    file = tmp_path / "x.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png") as found:
        read_image(file)
    assert found.value.kind == kind


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 300, "."])
def test_names_that_no_image_has_are_refused(tmp_path, name):
    with pytest.raises(ImageError) as found:
        read_image(tmp_path / name)
    assert found.value.kind == "unreadable"


def test_a_picture_above_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("vision.images.MAX_PIXELS", 50)
    with pytest.raises(ImageError, match="claims 9 x 6 pixels"):
        read_image(saved(tmp_path / "a.png", Image.fromarray(picture())))
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS  # Pillow's own comes later


def test_unusual_kinds_are_read_and_counted(tmp_path):
    rgb = Image.fromarray(picture())
    half = rgb.copy()
    half.putalpha(Image.fromarray(np.full((6, 9), 0, np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    files = {
        "alpha": saved(tmp_path / "alpha.png", half),
        "CMYK": saved(tmp_path / "cmyk.jpg", rgb.convert("CMYK")),
        "palette": saved(tmp_path / "palette.gif", rgb.convert("P")),
        "EXIF": saved(tmp_path / "exif.jpg", rgb, exif=exif),
        "animated": saved(
            tmp_path / "moves.gif", rgb.convert("P"), save_all=True,
            append_images=[Image.new("P", rgb.size, 3)],
        ),
        "16": saved(tmp_path / "deep.png", grey16),
        "grey": saved(tmp_path / "grey.png", rgb.convert("L")),
    }  # fmt: skip
    findings = Findings()
    read = {name: read_image(file, findings) for name, file in files.items()}
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in read.values())
    assert (read["alpha"] == 255).all()  # laid on white
    assert (read["16"] == 255).all()
    assert read["EXIF"].shape == (9, 6, 3)  # turned upright
    report = "\n".join(findings.report())
    for said in ("alpha", "CMYK", "rotated by EXIF", "animated", "mode I;16", "mode P"):
        assert said in report, report
    assert "grey.png" not in report


def test_preparing_to_read_pads_with_grey():
    white = np.full((10, 20, 3), 255, np.uint8)
    pixels = prepare_to_read(white, 40)
    assert pixels.shape == (3, 40, 40)
    grey = (np.float32(GREY) / 255 - 0.5) / 0.5
    assert (pixels[:, 10:30] == 1).all()
    assert (pixels[:, :10] == grey).all()
    assert (pixels[:, 30:] == grey).all()
    assert prepare_to_read(np.full((1, 500, 3), 255, np.uint8), 40)[:, 13:27].min() == 1  # MIN_SIDE


def test_preparing_to_draw_cuts_the_middle():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 255
    pixels = prepare_to_draw(image, 8)
    assert pixels.shape == (3, 8, 8)
    assert (pixels == 1).all()
    assert (to_bytes(pixels) == 255).all()
    # Not scaled up as a whole: that would be 16 million pixels.
    thin = np.zeros((20_000, 1, 3), np.uint8)
    thin[9_000:11_000] = 255
    assert (prepare_to_draw(thin, 28) == 1).all()
    # The published way back cuts fractions off.
    again = to_bytes(prepare_to_draw(picture(9, 9), 9))
    assert np.abs(again.astype(int) - picture(9, 9)).max() <= 1


def test_a_sheet_holds_every_picture(tmp_path):
    colours = [np.full((8, 8, 3), 10 * n, np.uint8) for n in range(1, 6)]
    sheet = contact_sheet(colours, [f"picture {n}" for n in range(5)], columns=3, side=32)
    for n in range(1, 6):
        assert (sheet == 10 * n).all(-1).sum() >= 32 * 32
    write_png(tmp_path / "sheet.png", sheet)
    np.testing.assert_array_equal(read_image(tmp_path / "sheet.png"), sheet)


def test_records_name_what_they_leave_out(tmp_path):
    saved(tmp_path / "good.png", Image.fromarray(picture()))
    (tmp_path / "lines.jsonl").write_text(
        '{"image": "good.png", "caption": "a picture"}\n'
        '{"images": ["good.png"], "messages": [{"role": "user", "content": "?"},'
        ' {"role": "assistant", "content": "!"}]}\n'
        '{"text": "words"}\n'
        "not json\n"
        '{"image": "good.png"}\n'
        '{"messages": [{"role": "assistant", "content": "!"}]}\n'
        '{"text": "\\ud800"}\n' + "[" * 100_000
    )
    findings = Findings()
    records = read_records(tmp_path / "lines.jsonl", findings)
    assert [record.kind for record in records] == ["draw", "read", "text"]
    assert findings.counts["line that is no record"] == 5
    assert "lines.jsonl:4" in findings.report()[0]


def test_a_folder_of_pairs(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path / f"{name}.png", Image.fromarray(picture()))
    (tmp_path / "a.txt").write_text("a picture\n")
    findings = Findings()
    (record,) = read_records(tmp_path, findings)
    assert (record.kind, record.text) == ("draw", "a picture")
    assert findings.counts == {"image without a .txt": 1}
    with pytest.raises(ValueError, match="no such file or folder"):
        read_records(tmp_path / "none", findings)


def test_broken_images_are_left_out_of_training(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    saved(tmp_path / "good.png", Image.fromarray(picture()))
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text(name)
    findings = Findings()
    records = read_records(tmp_path, findings)
    assert len(records) == 2
    source = FileSource(records, MODEL, None, None, 0.0, findings)  # pyright: ignore
    for seed in range(4):
        assert source.image(np.random.default_rng(seed)).shape == (3, 4, 4)
    assert findings.counts == {"empty": 1}
    talk = Record("read", "", messages=({"role": "user", "content": "?"},) * 2)  # of no image
    source = FileSource([*records, talk], MODEL, None, None, 0.0, Findings())  # pyright: ignore
    for seed in range(8):
        assert source.image(np.random.default_rng(seed)).shape == (3, 4, 4)
    only = FileSource(records[:1], MODEL, None, None, 0.0, Findings())  # pyright: ignore
    with pytest.raises(ValueError, match="whose images can be read"):
        only.image(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EncoderConfig(num_heads=7), "does not split into num_heads"),
        (lambda: TokenizerConfig(base_width=24), "32 groups"),
        (lambda: TokenizerConfig(num_codes=0), "num_codes"),
        (lambda: ImageTraining(read=0, draw=0), "all 0"),
        (lambda: ImageTraining(condition_dropout=2), "a share"),
        (lambda: JanusConfig(**{**_fields(), "image_token_id": 99}), "outside the vocabulary"),
        (lambda: JanusConfig(**{**_fields(), "drawn_tokens": 5}).drawn_grid, "a square"),
    ],
)
def test_configurations_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def _fields() -> dict:
    return {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
