"""Sources of text, and the way from text to batches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    path: str = "stdlib"
    """Folder, file or glob of text, .jsonl, .json, .csv or .parquet, also as .gz or .zst; `stdlib`
    is the interpreter's own source text."""
    weight: float = 1.0
    """Share of this source's tokens in the mixture (relative to the others')."""
    field: str = "text"
    """Field or column that holds the text in JSON, CSV and Parquet."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer and packing."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Sources that are mixed by weight."""
    cache_dir: str = "cache"
    """Folder for tokenizers and token stores; a store is rebuilt when what it is made from
    changes."""
    tokenizer: str = ""
    """Path of a `tokenizer.json`; empty trains one on the sources."""
    vocab_size: int = 4096
    """Size of a trained tokenizer's vocabulary, special tokens included."""
    held_out: float = 0.05
    """Share of documents kept for evaluation, chosen by a hash of each document's name."""
    held_out_tokens: int = 1_000_000
    """At most about so many tokens of 4 bytes are held out of a source, whatever the share; 0: no
    bound."""
    segment_mask: bool = False
    """Attend only within a document (SFT); pre-training packs without a mask (V3 report, 4.1)."""
    fim_rate: float = 0.1
    """Share of training documents rearranged for fill-in-the-middle, PSM order (V3 report, 4.1)."""
    min_file_bytes: int = 1
    """Files shorter than this are counted as empty and left out."""
