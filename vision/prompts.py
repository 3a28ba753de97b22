"""Conversations with images as token ids, in Janus-Pro's published template.

    <bos>SYSTEM\n\n<|User|>: <image_placeholder>\n{question}\n\n<|Assistant|>:
    <bos><|User|>: {caption}\n\n<|Assistant|>:<begin_of_image>

A placeholder becomes begin-of-image, one image token per patch, and end-of-image. What a person
writes cannot forge any of these: names of special tokens in it are letters.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from data.tokenizer import Tokenizer
from generation.chat import encode_guarded, guard_of, guarded
from vision.drawing import DrawingTokens

SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
NOTHING = np.zeros(0, np.int32)
PLACE, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"

TOKENS = (USER, ASSISTANT, PLACE, BEGIN, END)
"""What the template needs of a tokenizer."""


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Names of the three tokens around images."""

    place: str = PLACE
    begin: str = BEGIN
    end: str = END


def image_tokens(settings: Mapping[str, Any]) -> ImageTokens:
    """The names that a folder's tokenizer_config.json gives; else the released ones."""

    def name(key: str, default: str) -> str:
        extra = settings.get("extra_special_tokens")
        given = settings.get(key) or (extra.get(key) if isinstance(extra, Mapping) else None)
        return (given.get("content") if isinstance(given, dict) else given) or default

    return ImageTokens(name("image_token", PLACE), name("boi_token", BEGIN), name("eoi_token", END))


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A tokenizer that lays out conversations with images."""

    tokenizer: Tokenizer
    names: ImageTokens
    patches: int
    """Image tokens that one image takes."""

    def __post_init__(self):
        for name in (self.names.place, self.names.begin, self.names.end):
            if name not in self.tokenizer.marks:
                raise ValueError(f"the tokenizer has no special token {name!r}; give ids instead")

    def question(self, text: str, images: int, system: str | None = None) -> np.ndarray:
        """Ids, int32 [n], of a question about images, up to where the answer begins.

        system: None for the published one, "" for none.
        """
        return self.conversation([{"role": "user", "content": text}], images, system)[0]

    def conversation(
        self, messages: Sequence[Mapping[str, str]], images: int, system: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int32 [n], and which of them are answers with their ends, bool [n].

        The images stand before the first message of the user. Messages take turns, the user's
        first; after one of the user's the ids end where the answer begins. ValueError otherwise.
        """
        system = SYSTEM if system is None else system
        guard = guard_of(self.tokenizer, [*messages, {"system": system}])
        text = f"{guarded(self.tokenizer, system, guard)}\n\n" if system else ""
        parts: list[tuple[np.ndarray, bool]] = []
        for number, message in enumerate(messages):
            if message.get("role") != ("user", "assistant")[number % 2]:
                raise ValueError("messages take turns, the user's first; roles user and assistant")
            if number % 2:
                parts += [(self._ids(text, guard), False), (self.answer(message["content"]), True)]
                text = ""
                continue
            places = f"{self.names.place}\n" * images * (number == 0)
            said = guarded(self.tokenizer, message["content"], guard)
            text += f"{USER}: {places}{said}\n\n{ASSISTANT}:"
        parts.append((self._ids(text, guard), False))
        ids = self._begun(np.concatenate([part for part, _ in parts]))
        learned = np.concatenate([np.full(len(part), learn) for part, learn in parts])
        return ids, np.pad(learned, (len(ids) - len(learned), 0))

    def _ids(self, text: str, guard: str) -> np.ndarray:
        return self._spread(encode_guarded(self.tokenizer, text, guard) if text else NOTHING)

    def caption(self, text: str) -> np.ndarray:
        """Ids, int32 [n], of a picture's description, begin-of-image last."""
        guard = guard_of(self.tokenizer, [{"content": text}])
        said = guarded(self.tokenizer, text, guard)
        rest = f"{USER}: {said}\n\n{ASSISTANT}:{self.names.begin}"
        return self._begun(encode_guarded(self.tokenizer, rest, guard))

    def answer(self, text: str) -> np.ndarray:
        """Ids, int32 [n], of an answer to learn, the end included."""
        ids = self.tokenizer.encode(f" {text}")
        return np.concatenate([ids, np.array([self.tokenizer.end_id], np.int32)])

    @property
    def drawing(self) -> DrawingTokens:
        """Ids that drawing needs."""
        begin = self.tokenizer.token_id(self.names.begin)
        return DrawingTokens(self.tokenizer.bos_id, begin, self.tokenizer.pad_id)

    def _spread(self, ids: np.ndarray) -> np.ndarray:
        """Every placeholder with as many image tokens as an image has patches, and its ends."""
        place, begin, end = (
            self.tokenizer.token_id(name)
            for name in (self.names.place, self.names.begin, self.names.end)
        )
        one = np.array([begin, *[place] * self.patches, end], np.int32)
        parts = [one if i == place else np.array([i], np.int32) for i in ids]
        return np.concatenate([NOTHING, *parts])

    def _begun(self, ids: np.ndarray) -> np.ndarray:
        begins = self.tokenizer.conventions.begins
        first = [self.tokenizer.bos_id] if begins else []
        return np.concatenate([np.array(first, np.int32), ids])


def with_image_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same with the tokens of Janus-Pro's template, new ids at the end."""
    bare = tokenizers.Tokenizer.from_str(tokenizer.json)
    bare.add_special_tokens(list(TOKENS))
    settings = json.dumps(
        {
            "bos_token": tokenizer.conventions.bos,
            "eos_token": tokenizer.conventions.eos,
            "pad_token": tokenizer.conventions.pad,
        }
    )
    return Tokenizer(bare.to_str(), {"tokenizer_config.json": settings})


def folder_tokens(
    generation: Mapping[str, Any], conversations: Conversations | None
) -> DrawingTokens:
    """Ids for drawing: what generation_config.json says, else the tokenizer's; ValueError if
    neither does."""
    own = None if conversations is None else conversations.drawing
    extra = generation.get("generation_kwargs")
    begin = extra.get("boi_token_id") if isinstance(extra, Mapping) else None
    found = {
        "bos": generation.get("bos_token_id"),
        "begin": begin,
        "pad": generation.get("pad_token_id"),
    }
    for name, value in found.items():
        if type(value) is not int or value < 0:
            if own is None:
                raise ValueError(
                    f"neither generation_config.json nor a tokenizer says which token is {name} "
                    "(bos_token_id, pad_token_id, generation_kwargs.boi_token_id)"
                )
            found[name] = getattr(own, name)
    return DrawingTokens(**found)
