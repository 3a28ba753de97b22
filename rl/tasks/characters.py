"""A tokenizer with one token per entry of a task's vocabulary, in the form of all the others."""

import json
import re
from collections.abc import Iterable

from data.tokenizer import BOS, EOS, PAD, Tokenizer


def character_tokenizer(vocabulary: Iterable[str]) -> Tokenizer:
    """Ids 0, 1, 2 are bos, eos and pad, then the entries in their order (equal ones once, so the
    vocabularies of several tasks can be joined). Tags of several characters are one token.

    Its `encode` raises an exception for a character outside the vocabulary. ValueError if an entry
    is empty or names bos, eos or pad.
    """
    entries = list(dict.fromkeys(vocabulary))
    for entry in entries:
        if entry in ("", BOS, EOS, PAD):
            raise ValueError(f"a vocabulary entry is {entry!r}; give characters and tags of text")
    longest_first = sorted(entries, key=len, reverse=True)
    pieces = "|".join([re.escape(entry) for entry in longest_first if len(entry) > 1] + [r"[\s\S]"])
    special = [(index, name) for index, name in enumerate((BOS, EOS, PAD))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": name, "special": True, **flags} for index, name in special
        ],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pieces},
            "behavior": "Isolated",
            "invert": False,
        },
        "model": {
            "type": "WordLevel",
            "vocab": {name: index for index, name in enumerate((BOS, EOS, PAD, *entries))},
            "unk_token": "",
        },
        "decoder": {"type": "Fuse"},
    }
    return Tokenizer(json.dumps(spec))
