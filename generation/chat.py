"""Conversations laid out by a chat template, the folder's own or V3's and R1's.

A template is Jinja, as Hugging Face folders have it, and runs in a sandbox with what transformers
offers there. Without one a conversation is laid out as DeepSeek-V3 and R1 were trained: bos, the
system prompt, then for every turn its name and text, with no line break in between. Earlier answers
lose their reasoning, everything up to `</think>`, as in R1's released template.

No content can forge the end of a turn: names of marks (`data/tokenizer.py`) inside contents carry a
guard through the template, and what carries it is plain text.
"""

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from data.tokenizer import MARK, NoTokenError, Tokenizer

THINK, END_THINK = "<think>", "</think>"
ROLES = ("system", "user", "assistant")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field that holds an answer's reasoning apart from its content."""
UNREAD = (
    "tools", "functions", "tool_calls", "function_call", "system", "documents", "chat_template",
    "chat_template_kwargs",
)  # fmt: skip
"""Fields beside messages or a prompt that would change what a model reads, and do not here."""
BUILT_IN = (
    "{{ bos_token }}{{ messages | selectattr('role', 'equalto', 'system')"
    " | map(attribute='content') | join('\n\n') }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% elif message.role == 'assistant' %}"
    "<｜Assistant｜>{{ message.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>\n{% endif %}{% endif %}"
)
"""The template of folders without one; `thinking` opens the answer as R1 is meant to be used."""
_GUARDS = [chr(code) for code in range(0xE000, 0xE100)]
"""Private characters, of which one that no text holds is the guard."""


def check_messages(messages: Sequence[Any]) -> None:
    """Raise ValueError for an unknown role or field, a content that is no text, or messages that do
    not end with the user's."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} is {message!r}; its role must be one of {ROLES}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number}: content {message.get('content')!r} is no text")
        given = {name for name, value in message.items() if value not in (None, [])}
        more = REASONING if message["role"] == "assistant" else ()
        if unknown := sorted(given - {"role", "content", *more}):
            raise ValueError(
                f"message {number} of role {message['role']} has the fields {unknown}, which mean "
                "nothing here; leave them out, or write what they say into the content"
            )
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("a conversation must end with a user message for the model to answer")


def check_fields(fields: Mapping[str, Any], unread: Sequence[str] = UNREAD) -> None:
    """Raise ValueError if a record has one of the fields `unread`; other fields are provenance."""
    given = [name for name in unread if fields.get(name) not in (None, [], {}, "")]
    if given:
        raise ValueError(
            f"has the fields {given}, which are not read here; leave them out, or write what they "
            "say into messages"
        )


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], think: bool
) -> np.ndarray:
    """Ids, int32 [n], of a conversation and the opening of the answer to come.

    Raises ValueError as `check_messages` and `chat_text`.
    """
    check_messages(messages)
    guard = guard_of(tokenizer, messages)
    return encode_guarded(tokenizer, chat_text(tokenizer, messages, guard, think), guard)


def reads_think(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `think` changes how the template opens the answer."""
    guard = guard_of(tokenizer, messages)
    plain, thinking = (chat_text(tokenizer, messages, guard, think) for think in (False, True))
    return plain != thinking


def opens_thought(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the template, asked to think, opens the answer with <think>."""
    guard = guard_of(tokenizer, messages)
    return bool(think_opening(chat_text(tokenizer, messages, guard, think=True)))


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    guard: str,
    think: bool = False,
    ask: bool = True,
) -> str:
    """The text of a conversation; names of marks in its contents carry `guard`.

    think: the template's `thinking`. ask: end with the opening of the assistant's next answer.
    Raises ValueError for a template that cannot be read, refuses the messages or leaves a system
    message out, or has marks that are no tokens.
    """
    known = tokenizer.conventions

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return _compiled(known.template or BUILT_IN).render(
            messages=[_laid_out(tokenizer, message, guard) for message in messages],
            bos_token=known.bos,
            eos_token=known.eos,
            pad_token=known.pad,
            add_generation_prompt=ask,
            thinking=think,
            enable_thinking=think,
            tools=None,
            documents=None,
        )

    try:
        text = render(messages)
    except Exception as error:  # a template is a program of others
        raise ValueError(
            f"the chat template of the tokenizer's folder cannot lay out the conversation: {error}"
        ) from None
    for at, message in enumerate(messages):
        if message["role"] != "system" or not message["content"].strip():
            continue
        without = ""
        with contextlib.suppress(Exception):  # it may ask for one
            without = render([*messages[:at], *messages[at + 1 :]])
        if without == text:
            raise ValueError(
                f"the chat template of the tokenizer's folder leaves message {at}, of role system, "
                "out; put what it says into the user's"
            )
    for name in set(re.findall(MARK, text)):
        if known.template and name in (THINK, END_THINK):
            continue  # a folder's template may speak of them without having the tokens
        try:
            tokenizer.token_id(name)
        except NoTokenError as error:
            raise ValueError(
                f"{error}; conversations need it, so give the prompt as text"
            ) from None
    return text


def think_opening(text: str) -> str:
    """The opening of reasoning that a prompt ends with, <think> and perhaps a line break; or ''."""
    found = re.search(rf"{THINK}\n?\Z", text)
    return found[0] if found else ""


def split_answer(content: str) -> tuple[str, str, str, str, str]:
    """An answer's text as (blanks, <think> or '', reasoning, </think> or '', rest).

    <think> counts at the beginning, </think> where it stands last; elsewhere these are text.
    """
    before, opened, rest = content.partition(THINK)
    if before.strip():
        before, opened, rest = "", "", content
    return (before, opened, *rest.rpartition(END_THINK))


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """Reasoning that an answer has in a field of its own; None: there is none. ValueError for what
    is no text, or given twice."""
    given = [message[name] for name in REASONING if message.get(name) is not None]
    if not given:
        return None
    if len(given) > 1 or not isinstance(given[0], str):
        raise ValueError(f"give one of {', '.join(REASONING)}, a text")
    if given[0] and END_THINK in message["content"]:
        raise ValueError(
            f"reasoning is given in a field of its own and, to {END_THINK}, in content"
        )
    return given[0] or None


# ---- Guards --------------------------------------------------------------------------------------


def guard_of(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> str:
    """A character that neither the template nor a message holds."""
    texts = [text for message in messages for text in message.values() if isinstance(text, str)]
    used = set(tokenizer.conventions.template).union(*texts)
    found = next((guard for guard in _GUARDS if guard not in used), None)
    if found is None:
        raise ValueError("the messages hold 256 private characters of Unicode; leave one out")
    return found


def guarded(tokenizer: Tokenizer, text: str, guard: str) -> str:
    """The text with `guard` inside every name of a mark."""
    names = f"{tokenizer.mark_names}|{MARK}"
    return re.sub(names, lambda found: found[0][0] + guard + found[0][1:], text)


def encode_guarded(tokenizer: Tokenizer, text: str, guard: str) -> np.ndarray:
    """Ids, int32 [n], of a text whose marks are tokens, but for those with `guard` inside."""
    if guard not in text:
        return tokenizer.encode(text, special=True)
    parts = re.split(f"({tokenizer.mark_names})", text)
    ids = [
        [tokenizer.token_id(part)] if i % 2 else tokenizer.encode(part.replace(guard, ""))
        for i, part in enumerate(parts)
        if part
    ]
    return np.concatenate([np.asarray(part, np.int32) for part in ids])


def _laid_out(tokenizer: Tokenizer, message: Mapping[str, Any], guard: str) -> dict[str, str]:
    """The message as templates see it; <think> and </think> of answers, by which they cut, stay."""
    role, content = message["role"], message["content"]
    if role != "assistant":
        return {"role": role, "content": guarded(tokenizer, content, guard)}
    parts = (
        part if i % 2 else guarded(tokenizer, part, guard)
        for i, part in enumerate(split_answer(content))
    )
    found = {"role": role, "content": "".join(parts)}
    thought = reasoning_of(message)
    return found | ({"reasoning_content": guarded(tokenizer, thought, guard)} if thought else {})


# ---- Templates -----------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}..{% endgeneration %}`, which marks answers and changes no text."""

    tags = {"generation"}  # noqa: RUF012 - as the library has it

    def parse(self, parser: Any) -> Any:
        """Text between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    extensions: list[Any] = [_Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
