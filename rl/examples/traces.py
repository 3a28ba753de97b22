"""Traces on disk: answers chosen by rejection sampling, as token stores with their provenance.

A folder (or bucket) holds one token store per round of sampling, 00000, 00001, .., in the format of
`data/store.py`: a document is prompt, answer and end token, in the ids that were sampled, and all
documents are in the split train. Beside tokens and meta.json a store has

    traces.jsonl         a line per document: its text as `rl/examples/demonstrations.py` reads it,
                         and its provenance: problem, reward, round, seed, step, and the settings of
                         the run (checkpoint, sampler, ..)
    prompt_lengths.npy   int64 [documents], tokens of each prompt

meta.json comes last, so a round is there whole or not at all. A broken-off run goes on after its
last round and ends with the same traces. One process writes.
"""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data import storage
from data.sources import Document
from data.split import HoldOut
from data.store import TokenStore, build_store, find_store, seal_store
from data.tokenizer import Tokenizer
from generation.chat import think_opening
from rl.examples.conversations import Example, JoinedExamples, ListedExamples
from rl.examples.demonstrations import examples_of
from rl.examples.rejection import Attempt, Filter, Kept, Round, Selection, select

LINES, PROMPTS = "traces.jsonl", "prompt_lengths.npy"


@dataclasses.dataclass(frozen=True)
class Traces:
    """Traces of the rounds that are written whole."""

    stores: tuple[TokenStore, ...]
    """One per round; each can be read as a source of pre-training."""
    examples: JoinedExamples
    """Every trace, answers learned and prompts not."""

    @property
    def fates(self) -> Counter[str]:
        """Number of answers of all rounds by fate (`rl/examples/rejection.py:select`)."""
        return sum((Counter(s.meta["traces"]["fates"]) for s in self.stores), Counter[str]())


def transcript(stores: Sequence[TokenStore]) -> Iterator[dict[str, Any]]:
    """Lines of the stores' transcripts, a trace after the other, in the order of the examples."""
    for store in stores:
        for line in _read(store, LINES).decode("utf-8").splitlines():
            yield json.loads(line)


def write_traces(
    place: str,
    tokenizer: Tokenizer,
    answer: Callable[[int], Round],
    rounds: int,
    selection: Selection,
    filters: Mapping[str, Filter],
    settings: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> Traces:
    """Samples rounds 0..rounds - 1 and writes the chosen answers; rounds already there are kept.

    answer: round -> its answers, a function of the round's number. selection, filters: which of
    them are kept. settings: JSON values that say where answers come from (checkpoint, sampler, ..),
    the same for all rounds; they are in every line.

    Raises ValueError if the rounds already there were made with other settings or are more than
    `rounds`, and if no answer of any round was chosen. What `answer` raises (RolloutStoppedError)
    leaves the rounds before it whole, and nothing of its own.
    """
    same = _agreement(tokenizer, selection, filters, settings)
    stores = _find_rounds(place)
    for store in stores:
        _check_agreement(store, same)
    if len(stores) > rounds:
        raise ValueError(
            f"traces in {place} have {len(stores)} rounds, and this run has rounds={rounds}; ask "
            f"for {len(stores)} (sft.rounds), or write into another folder"
        )
    kept = _kept(stores)
    for number in range(len(stores), rounds):
        found = answer(number)
        chosen, fates = select(found.attempts, selection, filters, tokenizer.end_ids, kept)
        _write_round(place, number, tokenizer, chosen, found, {"fates": fates, **same})
        say(f"traces, round {number}: " + _in_words(fates))
    traces = read_traces(place, tokenizer)
    if not len(traces.examples.lengths):
        raise ValueError(
            f"traces in {place}: no answer was chosen in {len(traces.stores)} rounds; "
            f"{_in_words(traces.fates)}. Sample more, loosen the filters, or start from a better "
            "policy"
        )
    return traces


def read_traces(place: str, tokenizer: Tokenizer) -> Traces:
    """The traces of a folder or bucket, read where they are needed.

    Raises ValueError if there is none, or if they are in other tokens: see `told_traces`.
    """
    stores = _find_rounds(place)
    if not stores:
        raise ValueError(f"there are no traces in {place}; write some first")
    for store in stores:
        _check_agreement(store, {"tokenizer": tokenizer.sha256})
    return Traces(tuple(stores), JoinedExamples([_StoredExamples(store) for store in stores]))


def told_traces(
    place: str, tokenizer: Tokenizer, say: Callable[[str], None] = print
) -> ListedExamples:
    """The traces of a folder or bucket in the tokens of another tokenizer than they were sampled
    in: texts, through its own template. ValueError if there is none, naming a line that has no
    place in the template."""
    stores = _find_rounds(place)
    if not stores:
        raise ValueError(f"there are no traces in {place}; write some first")
    examples, names = [], []
    for store in stores:
        for number, line in enumerate(transcript([store]), 1):
            name = f"{storage.join(store.place, LINES)}:{number}"
            try:
                found = examples_of(line, tokenizer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            examples += found
            names += [name] * len(found)
    say(
        f"traces in {place} are in the tokens of another tokenizer: the texts of {len(examples)} "
        "are learned, in this run's own tokens and template"
    )
    return ListedExamples(examples, names)


def in_tokens_of(place: str, tokenizer: Tokenizer) -> bool:
    """Whether the traces of a folder or bucket, if there are any, were sampled in these tokens."""
    return all(s.meta["traces"]["tokenizer"] == tokenizer.sha256 for s in _find_rounds(place))


def count_rounds(place: str) -> int:
    """Number of rounds that are there whole."""
    return len(_find_rounds(place))


class _StoredExamples:
    """The traces of one store; tokens are read when asked for."""

    def __init__(self, store: TokenStore):
        self._store = store
        self._prompts = np.load(io.BytesIO(_read(store, PROMPTS)))
        self.lengths = np.diff(store.train.offsets)
        if len(self._prompts) != len(self.lengths):
            raise ValueError(
                f"traces {store.place}: {len(self.lengths)} documents, {len(self._prompts)} "
                f"lengths of prompts in {PROMPTS}. The store is damaged: delete it and all after it"
            )

    def __getitem__(self, index: int) -> Example:
        start, stop = map(int, self._store.train.offsets[index : index + 2])
        ids = self._store.train.read([(start, stop)])[0].astype(np.int32)
        return Example(ids, np.arange(len(ids)) >= self._prompts[index])

    def name(self, index: int) -> str:
        """The store and the line of its transcript."""
        return f"{storage.join(self._store.place, LINES)}:{index + 1}"


class _Sampled(Tokenizer):
    """A tokenizer whose ids are known already: those of a new encoding could be others."""

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[np.ndarray]):
        vars(self).update(vars(tokenizer))
        self._documents = iter(documents)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of the next documents, without their end."""
        return [next(self._documents) for _ in texts]


def _write_round(
    place: str,
    number: int,
    tokenizer: Tokenizer,
    chosen: Sequence[Attempt],
    found: Round,
    meta: dict[str, Any],
) -> None:
    place = _round_place(place, number)
    ids = [np.concatenate([attempt.prompt, attempt.answer]) for attempt in chosen]
    texts = [tokenizer.decode(row, skip_special=True) for row in ids]
    documents = [
        Document(attempt.problem.key, text, len(text.encode("utf-8")))
        for attempt, text in zip(chosen, texts, strict=True)
    ]
    sampled = _Sampled(tokenizer, [row[:-1] for row in ids])  # the store ends documents itself
    whole = build_store(place, documents, sampled, HoldOut(0), {"source": place, "traces": meta})
    source = {"round": number, "seed": found.seed, "step": found.step}
    lines = []
    for attempt in chosen:
        own = _line(attempt, tokenizer) | source
        assert not own.keys() & meta["settings"].keys(), (own, meta["settings"])
        lines.append(json.dumps(own | meta["settings"], ensure_ascii=False))
    storage.write_bytes(place, LINES, "".join(line + "\n" for line in lines).encode("utf-8"))
    prompts = io.BytesIO()
    np.save(prompts, np.array([len(attempt.prompt) for attempt in chosen], np.int64))
    storage.write_bytes(place, PROMPTS, prompts.getvalue())
    seal_store(place, whole)


def _line(attempt: Attempt, tokenizer: Tokenizer) -> dict[str, Any]:
    problem = attempt.problem
    own = {
        "problem": problem.key,
        "task": problem.task,
        "reward": attempt.reward,
        "prompt_tokens": len(attempt.prompt),
        "answer_tokens": len(attempt.answer),
        "digest": attempt.digest,
    }
    if isinstance(problem.prompt, str):
        return {"prompt": problem.prompt, "completion": attempt.text, **own}
    opened = think_opening(tokenizer.decode(attempt.prompt))
    answer = {"role": "assistant", "content": opened + attempt.text}
    return {"messages": [*problem.prompt, answer], **own}


def _kept(stores: Sequence[TokenStore]) -> Kept:
    kept = Kept()
    for line in transcript(stores):
        kept.add(line["problem"], line["digest"])
    return kept


def _round_place(place: str, number: int) -> str:
    return storage.join(place, f"{number:05d}")


def _find_rounds(place: str) -> list[TokenStore]:
    stores: list[TokenStore] = []
    while (store := find_store(_round_place(place, len(stores)))) is not None:
        stores.append(store)
    return stores


def _read(store: TokenStore, name: str) -> bytes:
    content = storage.read_bytes(store.place, name)
    if content is None:
        raise ValueError(
            f"traces {store.place}: {name} is gone; delete this store and all after it"
        )
    return content


def _agreement(
    tokenizer: Tokenizer,
    selection: Selection,
    filters: Mapping[str, Filter],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings that all rounds of a folder share, as JSON has them."""
    same = {
        "tokenizer": tokenizer.sha256,
        "selection": dataclasses.asdict(selection),
        "filters": list(filters),
        "settings": dict(settings),
    }
    return json.loads(json.dumps(same))


def _check_agreement(store: TokenStore, same: Mapping[str, Any]) -> None:
    before = store.meta["traces"]
    other = [name for name in same if before[name] != same[name]]
    if other:
        was, now = _differences(before, same, other), _differences(same, before, other)
        raise ValueError(
            f"traces {store.place} were made with {was}; this run has {now}. Write into another "
            "folder, or use the same"
        )


def _differences(of: Mapping[str, Any], than: Mapping[str, Any], names: Sequence[str]) -> str:
    """Values of the names in words; of a dict, the entries that differ in the other."""
    words = []
    for name in names:
        value, other = of[name], than[name]
        if isinstance(value, dict) and isinstance(other, dict):
            value = {key: x for key, x in value.items() if key not in other or other[key] != x}
        words.append(f"{name} {value}")
    return ", ".join(words)


def _in_words(fates: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items())) or "no answers"
