"""Split of documents into training and held-out text: a pure function of a document's name.

A hash, not a draw: adding, removing or reordering files moves no other document between the splits,
and raising the share only adds documents to the held-out side.
"""

import hashlib


def unit_hash(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the name and the purpose alone."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def is_held_out(name: str, share: float) -> bool:
    """Whether the document belongs to the held-out split. share: 0..1, share of documents."""
    return unit_hash(name, "held-out") < share


def check_split(source: str, train: int, held_out: int, share: float) -> None:
    """Raises ValueError if a split that should hold documents holds none."""
    total = train + held_out
    if train == 0:
        raise ValueError(
            f"source {source!r}: all {total} documents fall into the held-out split "
            f"(held_out={share}); none is left to train on. Lower held_out or add documents."
        )
    if held_out == 0 and share > 0:
        raise ValueError(
            f"source {source!r}: none of its {total} documents falls into the held-out split "
            f"(held_out={share} keeps about {share * total:.1f}). Raise held_out, cut the text "
            "into more documents (files, or lines of JSONL), or set held_out=0 to go "
            "without evaluation."
        )
