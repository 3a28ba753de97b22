"""Conversations as token ids for supervised fine-tuning, with a mark on those that are learned.

Text of the assistant alone is learned, the end of its turn included: a model that never learns to
end its turn never ends it. R1's template takes the reasoning out of earlier turns, so a turn
with reasoning stands whole only where it is the last. A conversation therefore becomes one example
that ends with its last turn, and one more that ends with each earlier turn that has reasoning.
Every turn is learned once, after exactly what stands before it when the model is used.

Letters: n tokens of an example.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data.tokenizer import Tokenizer
from generation.chat import ASSISTANT, END_THINK, EOS, THINK, Piece, chat_pieces


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of one document, with a mark on those that are learned."""

    ids: np.ndarray
    """int32 [n]."""
    learned: np.ndarray
    """bool [n]: the loss counts the prediction of this token. Nothing predicts the first."""

    def __post_init__(self):
        assert self.ids.shape == self.learned.shape, (self.ids.shape, self.learned.shape)
        if not self.learned.any() or self.learned[0]:
            raise ValueError(
                f"an example of {len(self.ids)} tokens has nothing to learn, or no token before "
                "it; give a prompt and an answer"
            )


class Examples(Protocol):
    """Examples by number; their lengths are known without reading them."""

    lengths: np.ndarray
    """Tokens of each, int64 [number of examples]."""

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """Place that the example comes from, for messages."""
        ...


class ListedExamples:
    """Examples in memory: 5 bytes per token."""

    def __init__(self, examples: Sequence[Example], names: Sequence[str]):
        assert len(examples) == len(names), (len(examples), len(names))
        self._examples, self._names = examples, names
        self.lengths = np.array([len(example.ids) for example in examples], np.int64)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def name(self, index: int) -> str:
        """Place that the example comes from."""
        return self._names[index]


class JoinedExamples:
    """The examples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Examples]):
        self._sources = sources
        self._ends = np.cumsum([len(source.lengths) for source in sources])
        parts = [source.lengths for source in sources]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *parts])

    def __getitem__(self, index: int) -> Example:
        source, number = self._find(index)
        return source[number]

    def name(self, index: int) -> str:
        """Place that the example comes from."""
        source, number = self._find(index)
        return source.name(number)

    def _find(self, index: int) -> tuple[Examples, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[which], index - (int(self._ends[which - 1]) if which else 0)


def encode_pair(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """A text and how it goes on, learned with the end token after it. ValueError if one is empty.

    The two are encoded apart, as prompt and answer are when the model is used.
    """
    if not prompt or not completion:
        raise ValueError(f"the {'completion' if prompt else 'prompt'} is an empty text")
    return _joined(
        [
            (tokenizer.encode(prompt), False),
            (tokenizer.encode(completion), True),
            (np.array([tokenizer.eos_id], np.int32), True),
        ]
    )


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Any]) -> list[Example]:
    """Examples of a conversation, `messages` of "role" and "content", that ends with an answer.

    An answer that begins with <think>, or holds </think>, has the special tokens there: at the
    first <think> and at the last </think>. Elsewhere these are text.

    Raises ValueError for what `chat_pieces` refuses, no answer at the end, an empty answer,
    reasoning that does not end, and a tokenizer without the tokens of the chat template.
    """
    if not messages or not isinstance(messages[-1], Mapping):
        raise ValueError("a conversation to learn from is a list of messages; give at least two")
    if messages[-1].get("role") != "assistant":
        raise ValueError(
            f"a conversation to learn from must end with the assistant's answer, not with role "
            f"{messages[-1].get('role')!r}"
        )
    chat_pieces(messages[:-1])  # raises for roles, contents and order
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    pieces = {at: _answer_pieces(messages, at) for at in turns}
    apart = [at for at in turns[:-1] if Piece(END_THINK, True) in pieces[at]]
    together = {at for at in turns if at not in apart}
    examples = [_example(tokenizer, messages[: at + 1], pieces[at], {at}) for at in apart]
    return [*examples, _example(tokenizer, messages, pieces[turns[-1]], together)]


def _answer_pieces(messages: Sequence[Mapping[str, Any]], at: int) -> list[Piece]:
    """An answer as the model writes it: reasoning, answer, end of turn."""
    content = messages[at]["content"]
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {at}: the assistant's answer is empty or no text: {content!r}")
    if not at or messages[at - 1]["role"] != "user":
        raise ValueError(f"message {at} of the assistant does not follow a message of the user")
    before, opened, rest = content.partition(THINK)
    if before.strip():
        before, opened, rest = "", "", content
    thought, closed, answer = rest.rpartition(END_THINK)
    if opened and not closed:
        raise ValueError(f"message {at} opens {THINK} and never closes it; end the reasoning")
    texts = (before, opened, thought, closed, answer, EOS)  # every other one is a special token
    return [Piece(text, bool(i % 2)) for i, text in enumerate(texts) if text]


def _example(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    answer: list[Piece],
    learned: set[int],
) -> Example:
    """The conversation with `answer` as its last turn; `learned` are numbers of messages."""
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    parts: list[tuple[np.ndarray, bool]] = []
    turn, inside = -1, False
    for piece in [*chat_pieces(messages[:-1]), *answer]:
        parts.append((_ids(tokenizer, piece), inside and turns[turn] in learned))
        if piece == Piece(ASSISTANT, True):
            turn, inside = turn + 1, True
        elif piece == Piece(EOS, True):
            inside = False
    assert (turn, inside) == (len(turns) - 1, False), (turn, turns)
    return _joined(parts)


def _ids(tokenizer: Tokenizer, piece: Piece) -> np.ndarray:
    if not piece.special:
        return tokenizer.encode(piece.text)
    try:
        return np.array([tokenizer.token_id(piece.text)], np.int32)
    except ValueError as error:
        raise ValueError(
            f"{error}; conversations need it, so give prompt and completion as texts"
        ) from None


def _joined(parts: Sequence[tuple[np.ndarray, bool]]) -> Example:
    learned = [np.full(len(ids), flag) for ids, flag in parts]
    return Example(np.concatenate([ids for ids, _ in parts]), np.concatenate(learned))
