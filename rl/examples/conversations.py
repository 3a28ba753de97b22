"""Conversations as token ids for supervised fine-tuning, with a mark on those that are learned.

Text of the assistant alone is learned, the end of its turn included: a model that never learns to
end its turn never ends it. What stands before an answer is what the chat template asks for one
with when the model is used; how an answer ends is what the template puts behind one. Every turn is
learned once. Turns share an example where one stands before the other as it was learned: R1's
template takes the reasoning out of earlier turns, so a turn with reasoning ends its example.

Letters: n tokens of an example.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data.tokenizer import Tokenizer
from generation.chat import (
    END_THINK,
    THINK,
    chat_text,
    check_messages,
    encode_guarded,
    guard_of,
    guarded,
    reasoning_of,
    split_answer,
    think_opening,
)

WEIGHTS = ("weight", "train")
"""Fields of a message that say whether it is learned."""
_ASKED = {"role": "user", "content": "a"}


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
            (tokenizer.encode_prompt(prompt), False),
            (tokenizer.encode(completion), True),
            (np.array([tokenizer.end_id], np.int32), True),
        ]
    )


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Any]) -> list[Example]:
    """Examples of a conversation, `messages` of "role" and "content", that ends with an answer.

    An answer that begins with <think>, or holds </think>, has the marks there: at the first <think>
    and at the last </think>. Elsewhere these are text. "reasoning_content" (or "thinking") is
    reasoning that is put before the content. "weight" 0 or "train" false leaves an answer
    unlearned.

    Raises ValueError for what `check_messages` refuses, no answer at the end, an empty answer,
    none that is learned, reasoning that does not end, other weights than 0 and 1, a tokenizer
    without the tokens of the chat template, and a template that no answer can be learned in.
    """
    if not messages or not isinstance(messages[-1], Mapping):
        raise ValueError("a conversation to learn from is a list of messages; give at least two")
    if messages[-1].get("role") != "assistant":
        raise ValueError(
            f"a conversation to learn from must end with the assistant's answer, not with role "
            f"{messages[-1].get('role')!r}"
        )
    learned = [_learned(at, message) for at, message in enumerate(messages)]
    messages = [
        {name: value for name, value in message.items() if name not in WEIGHTS}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]
    check_messages(messages[:-1])
    check_messages([*messages[:-1], {**messages[-1], "role": "assistant"}, _ASKED])
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    for at in turns:
        _check_answer(messages, at)
    if not any(learned[at] for at in turns):
        raise ValueError("no answer of the conversation is learned; give one a weight of 1")
    guard = guard_of(tokenizer, messages)
    return _merged([_turn(tokenizer, messages, at, guard) for at in turns if learned[at]])


def _learned(at: int, message: Any) -> bool:
    """Whether an answer is learned, by its "weight" and "train"."""
    if not isinstance(message, Mapping):
        return False
    given = {name: message[name] for name in WEIGHTS if message.get(name) is not None}
    weight, train = given.get("weight", 1), given.get("train", True)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"message {at}: weight {weight!r}; a turn is learned (1) or not (0)")
    if not isinstance(train, bool):
        raise ValueError(f"message {at}: train {train!r}; give true or false")
    if given and message.get("role") != "assistant" and weight and train:
        raise ValueError(
            f"message {at} of role {message.get('role')!r} has {given}; answers alone are learned"
        )
    return bool(weight) and train


def _check_answer(messages: Sequence[Mapping[str, Any]], at: int) -> None:
    content = messages[at]["content"]
    if not content.strip():
        raise ValueError(f"message {at}: the assistant's answer is empty: {content!r}")
    if not at or messages[at - 1]["role"] != "user":
        raise ValueError(f"message {at} of the assistant does not follow a message of the user")
    try:
        reasoning_of(messages[at])
    except ValueError as error:
        raise ValueError(f"message {at}: {error}") from None
    _, opened, _, closed, _ = split_answer(content)
    if opened and not closed:
        raise ValueError(f"message {at} opens {THINK} and never closes it; end the reasoning")


def _turn(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], at: int, guard: str
) -> Example:
    """The conversation to the answer `at`, which alone is learned."""
    before = messages[:at]
    # What a template puts around an answer is seen around a character that stands nowhere else.
    slot = guard_of(tokenizer, [*messages, {"guard": guard}])
    given = [*before, {"role": "assistant", "content": slot}]
    head, _, tail = chat_text(tokenizer, given, guard, ask=False).partition(slot)
    ends = np.isin(ids := encode_guarded(tokenizer, tail, guard), tokenizer.end_ids)
    if not ends.any():
        raise ValueError(
            f"the chat template ends an answer with {tail!r}, which holds none of the tokens that "
            f"end one ({tokenizer.end_ids}); name it in generation_config.json, eos_token_id"
        )
    plain, thinking = (chat_text(tokenizer, before, guard, think) for think in (False, True))
    safe = functools.partial(guarded, tokenizer, guard=guard)
    try:
        prompt, answer = _asked(messages[at], plain, thinking, head, safe)
    except ValueError as error:
        raise ValueError(f"message {at}: {error}") from None
    answered = encode_guarded(tokenizer, answer, guard), ids[: int(ends.argmax()) + 1]
    return _joined(
        [
            (encode_guarded(tokenizer, prompt, guard), False),
            *((part, True) for part in answered),
        ]
    )


def _asked(
    message: Mapping[str, Any], plain: str, thinking: str, head: str, safe: Callable[[str], str]
) -> tuple[str, str]:
    """The prompt that an answer is learned after, and its text.

    Args:
      plain, thinking: the prompts without and with reasoning asked for.
      head: what stands before an answer once it is given.
      safe: keeps the names of marks in a text from being marks.
    Raises ValueError where the template has no place for such an answer.
    """
    content = message["content"]
    before, opened, thought, closed, answer = split_answer(content)
    apart = reasoning_of(message)
    if not closed and apart is None:
        if not head.startswith(plain):
            raise ValueError(
                f"the chat template asks for an answer with {plain[-20:]!r} and puts a given one "
                f"behind {head[-20:]!r}; give the reasoning too, as reasoning_content"
            )
        return plain, head[len(plain) :] + safe(content)
    opening = think_opening(thinking)
    by_model = thinking == plain + opening  # the answer itself opens the reasoning
    prompt = plain if by_model else thinking
    inside = bool(opening) and not by_model
    if not inside and prompt.endswith(END_THINK):
        raise ValueError("the chat template has no place for reasoning")
    if apart is None:
        if not inside:
            return prompt, before + opened + safe(thought) + closed + safe(answer)
        if opened and opening.endswith("\n"):
            thought = thought.removeprefix("\n")
        return prompt, safe(thought) + closed + safe(answer)
    opening = opening or f"{THINK}\n"
    start = "" if inside else opening
    if opening.endswith("\n"):  # R1 writes reasoning and answer on lines of their own
        return prompt, f"{start}{safe(apart.strip())}\n{END_THINK}\n\n{safe(content.lstrip())}"
    return prompt, f"{start}{safe(apart)}{END_THINK}{safe(content)}"


def _merged(examples: list[Example]) -> list[Example]:
    """The examples, an earlier one taken into a later one that begins with it."""
    kept: list[Example] = []
    for example in reversed(examples):
        home = next((i for i, other in enumerate(kept) if _begins(other, example)), None)
        if home is None:
            kept.append(example)
            continue
        learned = kept[home].learned.copy()
        learned[: len(example.ids)] |= example.learned
        kept[home] = Example(kept[home].ids, learned)
    return kept[::-1]


def _begins(longer: Example, example: Example) -> bool:
    return np.array_equal(longer.ids[: len(example.ids)], example.ids)


def _joined(parts: Sequence[tuple[np.ndarray, bool]]) -> Example:
    learned = [np.full(len(ids), flag) for ids, flag in parts]
    return Example(np.concatenate([ids for ids, _ in parts]), np.concatenate(learned))
