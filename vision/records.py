"""Images with texts from files: JSON Lines of conversations and captions, or a folder of pairs.

    {"images": ["a.png"], "messages": [{"role": "user", "content": ".."}, ..]}
    {"image": "a.png", "caption": "a red circle"}
    {"text": "words without an image"}

Paths are relative to the file. In a folder, a.txt describes a.png. Files that cannot be read are
named and counted, and their records left out; the run goes on with the rest.

Letters: P codes of an image.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vision.batches import KINDS, Example, draw_example, read_example, text_example
from vision.config import JanusConfig
from vision.images import Findings, ImageError, prepare_to_draw, prepare_to_read, read_image
from vision.prompts import Conversations

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a folder that are taken for images; others beside a .txt are named."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One example, its images not read yet."""

    kind: str
    where: str
    images: tuple[Path, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""


def read_records(place: Path, findings: Findings) -> list[Record]:
    """Records of a .jsonl file or a folder. ValueError if there is none that can be used."""
    if place.is_dir():
        found = list(_pairs(place, findings))
    elif place.is_file():
        found = list(_lines(place, findings))
    else:
        raise ValueError(f"{place}: no such file or folder; give JSON Lines or a folder of images")
    if not found:
        said = "; ".join(findings.report()) or "nothing was found"
        raise ValueError(f"{place} holds no record that can be used ({said})")
    return found


def _pairs(folder: Path, findings: Findings) -> Iterator[Record]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES:
            continue
        text = file.with_suffix(".txt")
        if not text.is_file():
            findings.add("image without a .txt", str(file))
            continue
        try:
            caption = text.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            caption = ""
        if not caption:
            findings.add("no text in the .txt", str(text))
            continue
        yield Record("draw", str(file), (file,), text=caption)


def _lines(file: Path, findings: Findings) -> Iterator[Record]:
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            fields = json.loads(line)
            # JSON can spell half of a surrogate pair, which is no text.
            json.dumps(fields, ensure_ascii=False).encode()
            yield _record(fields, file.parent, where)
        except (ValueError, RecursionError) as error:
            findings.add("line that is no record", f"{where} ({error})")


def _record(fields: Any, folder: Path, where: str) -> Record:
    """ValueError for anything but one of the three forms."""
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    given = fields.get("images", [fields["image"]] if "image" in fields else [])
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise ValueError("images must be a list of paths")
    images = tuple(folder / name for name in given)
    if isinstance(fields.get("caption"), str) and fields["caption"].strip():
        if len(images) != 1:
            raise ValueError(f"a caption describes one image, not {len(images)}")
        return Record("draw", where, images, text=fields["caption"].strip())
    messages = fields.get("messages", fields.get("conversations"))
    if isinstance(messages, list):
        ok = len(messages) > 1 and all(
            isinstance(message, dict)
            and message.get("role") == ("user", "assistant")[i % 2]
            and isinstance(message.get("content"), str)
            for i, message in enumerate(messages)
        )
        if not ok:
            raise ValueError("messages take turns, user and assistant, each with a content")
        return Record("read", where, images, tuple(messages))
    if isinstance(fields.get("text"), str) and fields["text"].strip() and not images:
        return Record("text", where, text=fields["text"])
    raise ValueError("neither messages, nor image and caption, nor text")


class FileSource:
    """Examples of records; images are read when they are drawn.

    Args:
      encode: codes [P] of an image prepared for drawing, float32 [3, H, W].
      drop: share of drawing examples that lose their words, for guidance.
    """

    def __init__(
        self,
        records: list[Record],
        config: JanusConfig,
        talk: Conversations,
        encode: Callable[[np.ndarray], np.ndarray],
        drop: float,
        findings: Findings,
    ):
        self._config, self._talk, self._encode, self._drop = config, talk, encode, drop
        self.findings = findings
        self._records = {
            kind: [record for record in records if record.kind == kind] for kind in KINDS
        }
        self._codes: dict[Path, np.ndarray] = {}
        self._seen: set[Path] = set()
        self._broken: set[Path] = set()

    def counts(self) -> dict[str, int]:
        """Records of each kind."""
        return {kind: len(records) for kind, records in self._records.items()}

    def image(self, rng: np.random.Generator) -> np.ndarray:
        """A random image prepared for the image tokenizer."""
        record = self._pick(("draw", "read"), rng, seen=True)
        return prepare_to_draw(self._read(record.images[0]), self.paint_side)

    @property
    def paint_side(self) -> int:
        """Pixels along a side of a drawn image."""
        return self._config.drawn_grid * self._config.tokenizer.scale

    def draw(self, kind: str, rng: np.random.Generator) -> Example:
        """A random example of a kind. ValueError when every record of the kind is broken."""
        record = self._pick((kind,), rng)
        if kind == "text":
            ids = self._talk.tokenizer.encode_prompt(record.text)
            return text_example(np.append(ids, np.int32(self._talk.tokenizer.eos_id)))
        if kind == "read":
            side = self._config.encoder.image_size
            images = tuple(prepare_to_read(self._read(path), side) for path in record.images)
            return read_example(self._talk, record.messages, images)
        path = record.images[0]
        if path not in self._codes:
            self._codes[path] = self._encode(prepare_to_draw(self._read(path), self.paint_side))
        blank = bool(rng.random() < self._drop)
        return draw_example(self._talk, record.text, self._codes[path], blank)

    def _pick(self, kinds: tuple[str, ...], rng: np.random.Generator, seen: bool = False) -> Record:
        """A random record whose images can be read, `seen`: of which there is one; what cannot is
        named once, and skipped."""
        records = [r for kind in kinds for r in self._records[kind] if r.images or not seen]
        for place in rng.permutation(len(records)) if records else ():
            record = records[place]
            if all(self._readable(path) for path in record.images):
                return record
        raise ValueError(
            f"there is no record of kind {' or '.join(kinds)} whose images can be read; leave the "
            f"kind out of the mixture, or give others ({'; '.join(self.findings.report())})"
        )

    def _readable(self, path: Path) -> bool:
        if path in self._broken:
            return False
        if path not in self._seen:
            try:
                read_image(path, self.findings)
                self._seen.add(path)
            except ImageError as error:
                self._broken.add(path)
                self.findings.add(error.kind, str(error))
                return False
        return True

    def _read(self, path: Path) -> np.ndarray:
        return read_image(path)
