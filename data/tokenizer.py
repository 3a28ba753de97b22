"""Text to token ids and back: any `tokenizer.json`, or a byte-level BPE trained as DeepSeek's is.

A trained tokenizer has DeepSeek-V3's pre-tokeniser and special tokens: bos, eos and pad are ids 0,
1 and 2, then bytes and merges, then place-holders up to the size asked for, then the remaining
special tokens at the end of the vocabulary. The report also splits a share of the tokens that join
punctuation and line breaks at random (V3 report, 4.1); that share is not published and we do not.

The name of a mark inside a document is text, so no document can forge the end of a turn. Marks
are special tokens, and added tokens that are named like one (<think>, <｜User｜>, <|EOT|>):
DeepSeek's own file calls most of these `special: false`. Other added tokens are found in text, as
tokenizer.json says.
"""

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.conventions import BESIDE, BOS, EOS, PAD, read_conventions

THINK = ("<think>", "</think>")
FIM_HOLE, FIM_BEGIN, FIM_END = (f"<｜fim▁{part}｜>" for part in ("hole", "begin", "end"))
TURNS = ("<｜User｜>", "<｜Assistant｜>", "<|EOT|>")
TOOLS = tuple(
    f"<｜tool▁{part}｜>"
    for part in (
        "calls▁begin", "calls▁end", "call▁begin", "call▁end",
        "outputs▁begin", "outputs▁end", "output▁begin", "output▁end", "sep",
    )
)  # fmt: skip
FIRST = (BOS, EOS, PAD)
LAST = (*THINK, FIM_HOLE, FIM_BEGIN, FIM_END, *TURNS, *TOOLS)
MIN_VOCAB = len(FIRST) + 256 + len(LAST)
"""Special tokens and single bytes; merges come on top."""

MARK = r"<[|｜][^|｜\s]+[|｜]>|</?think>"
"""Names of tokens that no text may forge, whatever a tokenizer.json calls them."""

# Patterns of DeepSeek-V3's published tokenizer, applied in this order.
DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@dataclasses.dataclass(frozen=True)
class FimTokens:
    """Ids of the fill-in-the-middle tokens."""

    begin: int
    hole: int
    end: int


class NoTokenError(ValueError):
    """A name, or a character of a text, that the tokenizer has no token for; the message has it."""


class Tokenizer:
    """A `tokenizer.json` with the conventions of the files beside it (`data/conventions.py`).

    Attributes: json (its text), sha256, vocab_size (largest id + 1), conventions, bos_id (eos_id
    where there is none), eos_id, pad_id, marks (names that plain text cannot give), mark_names (a
    pattern of them), specials (those that decoding leaves out), fim (FimTokens, or None if the
    vocabulary has none), and byte_lengths: int32 [vocab_size], UTF-8 bytes that each id stands for
    (0 for marks), or None if tokens are not byte strings.

    Args:
      files: name -> text of the files beside. ValueError if these or a token are no good.
    """

    def __init__(self, json_text: str, files: Mapping[str, str] | None = None):
        self.json = json_text
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self._beside = dict(files or {})
        self.conventions = read_conventions(self._beside)
        spec = json.loads(json_text)
        self._full = tokenizers.Tokenizer.from_str(json_text)
        added = spec.get("added_tokens", ())
        named = {token["content"]: bool(token.get("special")) for token in added}
        self.specials = tuple(name for name, special in named.items() if special)
        self.marks = tuple(x for x in named if named[x] or re.fullmatch(MARK, x))
        longest_first = sorted(self.marks, key=len, reverse=True)
        self.mark_names = "|".join(map(re.escape, longest_first)) or "(?!)"
        # Special tokens are not looked for in plain text.
        marked = [{**token, "special": token["content"] in self.marks} for token in added]
        plain = {**spec, "added_tokens": marked, "post_processor": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self._plain.encode_special_tokens = True
        for tokenizer in (self._full, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        vocab = self._full.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._marked = np.zeros(self.vocab_size, bool)
        self._marked[[vocab[name] for name in self.marks]] = True
        known = self.conventions
        self.bos_id, self.eos_id = (self.token_id(x) for x in (known.bos or known.eos, known.eos))
        self.pad_id = vocab.get(known.pad, self.eos_id)  # DeepSeek's own config pads with eos
        if known.begins:
            self.token_id(known.begins)
        has_fim = {FIM_BEGIN, FIM_HOLE, FIM_END} <= vocab.keys()
        self.fim = FimTokens(vocab[FIM_BEGIN], vocab[FIM_HOLE], vocab[FIM_END]) if has_fim else None
        written = {token["content"]: len(token["content"].encode()) for token in added}
        self.byte_lengths = self._byte_lengths(vocab, written) if _is_byte_level(spec) else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.conventions.ends or (self.eos_id,)

    @property
    def end_id(self) -> int:
        """The id that ends an answer to learn: eos, if it is among `end_ids`."""
        return self.eos_id if self.eos_id in self.end_ids else self.end_ids[0]

    @property
    def files(self) -> dict[str, str]:
        """Name -> text of the files that a folder keeps of this tokenizer."""
        pad = self.conventions.pad
        pad = pad if self._full.token_to_id(pad) is not None else ""
        beside = self.conventions.write(self._beside, self.end_ids, pad)
        return {"tokenizer.json": self.json, **beside}

    def of_documents(self) -> "Tokenizer":
        """The same for a model that learned documents with eos between: prompts begin with it."""
        other = copy.copy(self)
        eos = self.conventions.eos
        other.conventions = dataclasses.replace(self.conventions, begins=eos, ends=())
        return other

    def token_id(self, token: str) -> int:
        """Id of a token by its exact name; ValueError if the vocabulary has no such token."""
        found = self._full.token_to_id(token)
        if found is None:
            raise NoTokenError(f"the tokenizer has no token {token!r} among {self.vocab_size}")
        return found

    def name_of(self, index: int) -> str | None:
        """Name of an id in the vocabulary; None if it has no such id."""
        return self._full.id_to_token(index)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids, int32 [n]. special: read the names of marks as those tokens (chat templates);
        otherwise they are plain text. Nothing is put before or after."""
        if special:
            try:
                return np.asarray(self._full.encode(text, add_special_tokens=False).ids, np.int32)
            except Exception as error:  # the library raises bare Exception
                letters = re.sub(MARK, "", text)
                raise NoTokenError(self._missing([letters]) or str(error)) from None
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids of a text to continue, int32 [n], after the token that texts begin with (once,
        where `special` names it at the start)."""
        ids = self.encode(text, special)
        begins = self.conventions.begins
        first = [self.token_id(begins)] if begins else []
        if ids[:1].tolist() == first:
            return ids
        return np.concatenate([np.array(first, np.int32), ids])

    def marks_in(self, text: str) -> list[str]:
        """Names of marks in a text, which are letters there unless they are read as special."""
        return sorted(set(re.findall(self.mark_names, text)))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of plain texts, int32 [n] each; the texts are encoded in parallel."""
        try:
            encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise NoTokenError(self._missing(texts) or str(error)) from None
        rows = [np.asarray(item.ids, np.int32) for item in encoded]
        for row in rows:
            if self._marked[row].any():
                name = self._full.id_to_token(int(row[self._marked[row]][0]))
                raise ValueError(
                    f"the tokenizer's model turns plain text into the special token {name!r}; a "
                    "document could forge it. Use a tokenizer whose model has no rule for it."
                )
        return rows

    def _missing(self, texts: Sequence[str]) -> str:
        """The character that has no token, in words; '' if no single one is to blame."""
        for character in dict.fromkeys("".join(texts)):
            try:
                self._plain.encode(character, add_special_tokens=False)
            except Exception:
                return f"the tokenizer has no token for {character!r}"
        return ""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of token ids. skip_special: leave out tokens marked special (not <think>)."""
        return self._full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _byte_lengths(self, vocab: dict[str, int], added: dict[str, int]) -> np.ndarray:
        # A byte-level token's name has one character per byte; an added token's is its text.
        lengths = np.zeros(self.vocab_size, np.int32)
        for name, index in vocab.items():
            lengths[index] = added.get(name, len(name))
        lengths[self._marked] = 0
        return lengths


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a `tokenizer.json` with what the files beside it say (`data/conventions.py`): names of
    its tokens, how prompts begin, ends, template. ValueError if there is no bos or eos."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"tokenizer {path.absolute()} is no file; give a tokenizer.json, or '' to train"
        )
    beside = [path.with_name(name) for name in BESIDE]
    try:
        files = {file.name: file.read_text("utf-8") for file in beside if file.is_file()}
        text = path.read_text("utf-8")
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    try:
        return Tokenizer(text, files)
    except NoTokenError as error:
        raise ValueError(
            f"tokenizer {path}: {error}. Name its tokens (bos_token, eos_token) in "
            f"{beside[0].name} beside it."
        ) from error
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from error


def tokenizer_of(given: str, own: Path | None) -> Tokenizer | None:
    """The tokenizer of the file `own`, which belongs to weights whose embeddings mean its ids; else
    that of the path `given`; None without either. '' is no path.

    Raises ValueError if both are there and give an id different meanings.
    """
    if own is None:
        return load_tokenizer(given) if given else None
    tokenizer = load_tokenizer(own)
    other = load_tokenizer(given) if given else tokenizer
    for index in range(max(tokenizer.vocab_size, other.vocab_size)):
        then, now = tokenizer.name_of(index), other.name_of(index)
        if then != now:
            raise ValueError(
                f"--data.tokenizer {given} is another tokenizer than {own}, which belongs to the "
                f"weights: id {index} is {then!r} there and {now!r} here. Leave --data.tokenizer "
                "out, or start from other weights"
            )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of exactly `vocab_size` ids; equal texts give an equal tokenizer.

    A corpus with too few merges leaves ids over: they become place-holders, as DeepSeek's
    vocabulary has. Raises ValueError if vocab_size has no room for bytes and special tokens.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(
            f"--data.vocab-size {vocab_size} is too small: {len(FIRST) + len(LAST)} special tokens "
            f"and 256 bytes need at least {MIN_VOCAB}"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in (DIGITS, CJK, WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST),
        special_tokens=list(FIRST),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    spec = json.loads(bpe.to_str())
    learned = bpe.get_vocab_size()
    for index in range(learned, vocab_size - len(LAST)):  # no merge leads to them
        spec["model"]["vocab"][f"<｜place▁holder▁no▁{index - learned}｜>"] = index
    bpe = tokenizers.Tokenizer.from_str(json.dumps(spec))
    # Reasoning must survive decoding without special tokens, so <think> is added but not special.
    bpe.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in THINK])
    bpe.add_special_tokens([name for name in LAST if name not in THINK])
    trained = Tokenizer(bpe.to_str())
    assert trained.vocab_size == vocab_size
    return trained


def _is_byte_level(spec: dict) -> bool:
    decoder = spec.get("decoder") or {}
    return decoder.get("type") == "ByteLevel" or any(
        part["type"] == "ByteLevel" for part in decoder.get("decoders", ())
    )
