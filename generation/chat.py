"""Conversations as DeepSeek-V3 and R1 were trained on them.

bos, the system prompt, then for every turn its name and text, with no line break in between:
`<｜User｜>question<｜Assistant｜>answer<｜end▁of▁sentence｜>`. Earlier answers lose their
reasoning, everything up to `</think>`, as in R1's released template.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A part of a conversation's text."""

    text: str
    special: bool
    """The text is the name of a special token; otherwise it is plain, whatever it says."""


def chat_pieces(messages: Sequence[Any], think: bool = False) -> list[Piece]:
    """The prompt for the assistant's next answer; `messages` have "role" and "content".

    `think` opens the answer with `<think>` and a line break, as R1 is meant to be used. Contents
    stay pieces of their own, so that no text can forge the end of a turn; special tokens separate
    them, so the ids are those of the joined text.

    Raises ValueError for an unknown role, a content that is no text, no last user message.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} is {message!r}; its role must be one of {ROLES}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number}: content {message.get('content')!r} is no text")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("a conversation must end with a user message for the model to answer")
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    pieces = [Piece(BOS, True), Piece(system, False)]
    for message in messages:
        if message["role"] == "user":
            pieces += [Piece(USER, True), Piece(message["content"], False)]
        elif message["role"] == "assistant":
            answer = message["content"].rpartition(END_THINK)[2]
            pieces += [Piece(ASSISTANT, True), Piece(answer, False), Piece(EOS, True)]
    pieces.append(Piece(ASSISTANT, True))
    if think:
        pieces += [Piece(THINK, True), Piece("\n", False)]
    return [piece for piece in pieces if piece.text]
