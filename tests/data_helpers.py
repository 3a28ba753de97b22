"""A small corpus and its preparation, shared by the tests of `data`."""

import random
from pathlib import Path

from data.config import DataConfig, SourceConfig
from data.prepare import Prepared, prepare

SEQ_LEN = 16


def write_corpus(folder: Path, files: int = 40, alphabet: str = "abcdefgh", seed: int = 0) -> Path:
    """ASCII documents of 20 to 400 characters in words of the alphabet."""
    words = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        length = words.randrange(5, 100)
        text = " ".join("".join(words.choices(alphabet, k=3)) for _ in range(length))
        (folder / f"{number:03d}.txt").write_text(text + "\n")
    return folder


def process_rows(micro_batch_size: int, process: int, processes: int) -> range:
    """Rows of each micro batch that one of `processes` equal processes reads."""
    share = micro_batch_size // processes
    return range(process * share, (process + 1) * share)


def prepared(folder: Path, *sources: SourceConfig, seed: int = 0, **options) -> Prepared:
    """Prepares sources (by default: one, of `write_corpus`) with a cache inside `folder`."""
    sources = sources or (SourceConfig(str(write_corpus(folder / "text"))),)
    settings = {"cache_dir": str(folder / "cache"), "vocab_size": 320, "held_out": 0.2, **options}
    return prepare(DataConfig(sources=sources, **settings), SEQ_LEN, seed)
