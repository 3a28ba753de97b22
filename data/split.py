"""Split of documents into training and held-out text: a pure function of a document's name.

A hash, not a draw: adding, removing or reordering files moves no other document between the splits,
and raising the share only adds documents to the held-out side. A corpus so small that a side would
be empty holds out the document of the lowest hash, or its end.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable

from data.readers import Document

LOOKED_AT = 64 << 20
"""Bytes of text in which a document to hold out is looked for."""


def unit_hash(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the name and the purpose alone."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def is_held_out(name: str, share: float) -> bool:
    """Whether the document belongs to the held-out split. share: 0..1, share of documents."""
    return unit_hash(name, "held-out") < share


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """The held-out part of a source."""

    share: float
    """Share of documents, chosen by the hash of their names."""
    name: str = ""
    """A document that is held out besides, where that could leave a side empty."""
    part: float = 1.0
    """Part of that document, at its end."""
    most: float = math.inf
    """Bytes of one document; of a longer one its end is held out."""

    def sides(self, document: Document) -> list[tuple[Document, bool]]:
        """The document, or the two parts of it, each with whether it is held out."""
        name, text, size = document
        out, part = is_held_out(name, self.share), 1.0
        if name == self.name:
            out, part = True, self.part
        part = min(part, self.most / max(size, 1))
        if not out or part == 1 or len(text) < 2:
            return [(document, out and part == 1)]
        at = min(max(round(len(text) * (1 - part)), 1), len(text) - 1)
        for mark in ("\n", " "):  # not in the middle of a line or a word, if there is a way
            if (found := text.rfind(mark, at // 2, at)) > 0:
                at = found + 1
                break
        return [
            (Document(name, half, len(half.encode("utf-8"))), out)
            for half, out in ((text[:at], False), (text[at:], True))
        ]

    def __str__(self) -> str:
        return self.name if self.part == 1 else f"the last {self.part:.2g} of {self.name}"


def choose_hold_out(documents: Iterable[Document], share: float, most: float = math.inf) -> HoldOut:
    """How to hold out about `share` of the documents so that no side is empty, and at most the last
    `most` bytes of any.

    By the hash of names; where that would leave a side empty, the document of the lowest hash is
    held out alone, and only its end if it is longer than that share of the text. Reads on until it
    has seen a document of both sides; after LOOKED_AT bytes of one side it holds out the end of the
    lowest there, and the hash decides about the others.
    """
    if not share:
        return HoldOut(share)
    seen: set[bool] = set()
    lowest, total, exact = (2.0, "", 1), 0, 0.0
    for name, _, size in documents:
        seen.add(is_held_out(name, share))
        if len(seen) == 2:
            return HoldOut(share, most=most)
        lowest, total = min(lowest, (unit_hash(name, "held-out"), name, size)), total + size
        if total > LOOKED_AT and seen == {False}:
            exact = share
            break
    _, name, size = lowest
    return HoldOut(exact, name, min(1.0, share * total / size), most)


def check_split(source: str, train: int, held_out: int, share: float) -> None:
    """Raises ValueError if a split that should hold documents holds none."""
    if train == 0 or (held_out == 0 and share > 0):
        raise ValueError(
            f"source {source!r}: {train + held_out} documents are too little text to hold out "
            f"{share} of it. Add text, or give --data.held-out 0 to go without evaluation"
        )
