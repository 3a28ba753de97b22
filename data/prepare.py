"""Everything between files and batches, in order: list, tokenizer, stores, checks.

Results are kept under `cache_dir` by the hash of what they are made from, so a change of any source
file, of the tokenizer or of the split makes new ones and a run in progress keeps its own. Old ones
stay until the folder is deleted. Processes of one machine wait for each other; over several
machines, call `prepare` on one first and on the others after it.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator

import tokenizers

from data import storage
from data.config import DataConfig
from data.report import Progress, SourceReport, told
from data.sources import READING, Source, check_disjoint, documents, find_source
from data.split import HoldOut, check_split, choose_hold_out, unit_hash
from data.store import FORMAT, TokenStore, build_store, find_store, seal_store
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TRAINING_TEXT = 64 << 20
"""Bytes of text a tokenizer is trained on; of a larger corpus a sample is read."""
SAMPLE = 1 << 20
"""Bytes of a sample from one file, at least."""
BYTES_PER_TOKEN = 4
"""By which the bound of held-out tokens becomes one of text, before there are tokens."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Data ready to be read; see data/loader.py and data/evaluation.py."""

    config: DataConfig
    seq_len: int
    seed: int
    tokenizer: Tokenizer
    stores: tuple[TokenStore, ...]
    """One per source, in the order of the configuration."""
    reports: tuple[SourceReport, ...]
    """Yield of each source and what was left out, by name."""


def prepare(
    config: DataConfig,
    seq_len: int,
    seed: int,
    progress: Progress = lambda line: None,
    tokenizer: Tokenizer | None = None,
) -> Prepared:
    """Builds or finds tokenizer and token stores. progress: receives lines of text.

    tokenizer: that of the weights to train; None reads or trains the one of `config`.
    seq_len (tokens per row) and seed are kept for the readers; neither changes a store.
    Raises ValueError on any configuration that cannot work and on sources without documents.
    """
    check_config(config, seq_len, seed)
    sources = [find_source(source, progress) for source in config.sources]
    check_disjoint(sources)
    with storage.one_builder(config.cache_dir, progress):
        tokenizer = tokenizer or _tokenizer(config, sources, progress)
        if config.fim_rate > 0 and tokenizer.fim is None:
            raise ValueError(
                f"--data.fim-rate is {config.fim_rate}, but the tokenizer has no "
                "fill-in-the-middle tokens; give --data.fim-rate 0"
            )
        stores = tuple(_store(config, source, tokenizer, progress) for source in sources)
    reports = tuple(SourceReport(**store.meta["report"]) for store in stores)
    for line in (line for report in reports for line in report.lines()):
        progress(line)
    return Prepared(config, seq_len, seed, tokenizer, stores, reports)


def check_config(config: DataConfig, seq_len: int, seed: int) -> None:
    """Raises ValueError on values that cannot work, before any file is read."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(f"data config: {message}")

    require(seq_len > 0, f"--train.seq-len is {seq_len}; it must be positive")
    require(0 <= seed < 1 << 32, f"--seed is {seed}, outside 0..2^32-1")
    require(len(config.sources) > 0, "--data.sources is empty; name at least one")
    for source in config.sources:
        require(
            0 < source.weight < float("inf"),
            f"source {source.path!r} has weight {source.weight}; weights must be positive. Remove "
            "the source to leave it out",
        )
    paths = [source.path for source in config.sources]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    require(not twice, f"sources {twice} are listed twice; raise the weight instead")
    require(
        0 <= config.held_out < 1, f"--data.held-out is {config.held_out}, outside 0..1 (1 excluded)"
    )
    require(
        config.held_out_tokens >= 0, f"--data.held-out-tokens is {config.held_out_tokens}, below 0"
    )
    require(0 <= config.fim_rate <= 1, f"--data.fim-rate is {config.fim_rate}, outside 0..1")


# ---- Tokenizer -----------------------------------------------------------------------------------


def _tokenizer(config: DataConfig, sources: list[Source], progress: Progress) -> Tokenizer:
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        progress(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size} ids")
        return tokenizer
    made_from = [_fingerprint(config, source) for source in sources]
    key = _hash([made_from, config.vocab_size, TRAINING_TEXT, tokenizers.__version__])
    place, name = storage.join(config.cache_dir, "tokenizers"), f"{key}.json"
    kept = storage.read_bytes(place, name)
    if kept is not None:
        try:
            return Tokenizer(kept.decode("utf-8"))
        except Exception as error:  # the tokenizers library raises bare Exception
            file = storage.join(place, name)
            raise ValueError(f"{file} is damaged ({error}); delete it to train it anew") from None
    start = time.monotonic()
    tokenizer = train_tokenizer(_training_texts(config, sources, progress), config.vocab_size)
    storage.write_bytes(place, name, tokenizer.json.encode("utf-8"))
    progress(f"tokenizer: trained {config.vocab_size} ids in {time.monotonic() - start:.1f} s")
    return tokenizer


def _training_texts(config: DataConfig, sources: list[Source], progress: Progress) -> Iterator[str]:
    """Training documents; where there is more text than TRAINING_TEXT, the beginnings of files.
    Held-out text is left out: merges learned from it would flatter the held-out loss."""
    size = sum(source.size for source in sources)
    sampled = f" on {TRAINING_TEXT / size:.2%} of the text" if size > TRAINING_TEXT else ""
    progress(f"tokenizer: training byte-level BPE{sampled}")
    for source in sources:
        files = [dataclasses.replace(source, files=(file,)) for file in source.files]
        left = each = math.inf
        if sampled:  # nobody reads a terabyte for it
            files.sort(key=lambda file: unit_hash(file.files[0].name, "tokenizer"))
            left = TRAINING_TEXT * source.size / size
            each = max(SAMPLE, left / len(files))
        hold_out = _hold_out(config, source)
        for part in files if sampled else [source]:
            room = min(each, left)
            for text in _training_side(config, part, hold_out):
                text = text if len(text) <= room else text[: int(room)]
                yield text
                room, left = room - len(text), left - len(text)
                if room <= 0:
                    break
            if left <= 0:
                break


def _training_side(config: DataConfig, source: Source, hold_out: HoldOut) -> Iterator[str]:
    unreported = SourceReport(source.config.path)  # the store's pass reports
    for document in documents(source, config.min_file_bytes, unreported):
        yield from (part.text for part, out in hold_out.sides(document) if not out)


# ---- Stores --------------------------------------------------------------------------------------


def _store(
    config: DataConfig, source: Source, tokenizer: Tokenizer, progress: Progress
) -> TokenStore:
    fingerprint = _hash([FORMAT, _fingerprint(config, source), tokenizer.sha256])
    stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in source.config.path)[-40:]
    place = storage.join(config.cache_dir, "stores", f"{stem}-{fingerprint[:16]}")
    store = find_store(place)
    if store is not None:
        return store
    start = time.monotonic()
    report = SourceReport(source.config.path)
    found = documents(source, config.min_file_bytes, report)
    meta = {"source": source.config.path, "fingerprint": fingerprint}
    hold_out = _hold_out(config, source)
    if hold_out.name:
        progress(f"{source.config.path}: few documents; held out: {hold_out}")
    read = told(found, progress, lambda count: _line(report))
    meta = build_store(place, read, tokenizer, hold_out, meta)
    if report.documents == 0:
        raise ValueError("\n".join(["no document could be read", *report.lines()]))
    counts = meta["splits"]
    documents_in = [counts[name]["documents"] for name in ("train", "held_out")]
    check_split(source.config.path, documents_in[0], documents_in[1], config.held_out)
    seal_store(place, {**meta, "report": dataclasses.asdict(report)})
    progress(
        f"{source.config.path}: {counts['train']['tokens']} training tokens in {documents_in[0]} "
        f"documents, {counts['held_out']['tokens']} held-out tokens in {documents_in[1]}, stored "
        f"in {place} in {time.monotonic() - start:.1f} s"
    )
    store = find_store(place)
    assert store is not None
    return store


def _hold_out(config: DataConfig, source: Source) -> HoldOut:
    """The held-out part of a source."""
    unreported = SourceReport(source.config.path)  # the store's pass reports
    found = documents(source, config.min_file_bytes, unreported)
    most = BYTES_PER_TOKEN * config.held_out_tokens or math.inf
    return choose_hold_out(found, _share(config, source), most)


def _line(report: SourceReport) -> str:
    return f"{report.source}: {report.documents} documents, {report.text_bytes / 1e6:.1f} MB"


def _share(config: DataConfig, source: Source) -> float:
    """Share of the source's documents held out, which is smaller for a large source."""
    bound = BYTES_PER_TOKEN * config.held_out_tokens or math.inf
    return min(config.held_out, bound / max(source.size, 1))


def _fingerprint(config: DataConfig, source: Source) -> list:
    """Everything that decides a source's documents and their split."""
    own = [READING, source.config.path, source.config.field, source.fingerprint()]
    return [*own, config.min_file_bytes, _share(config, source), config.held_out_tokens]


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
