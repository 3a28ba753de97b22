"""What tokenizer.json does not say: names of its tokens, how a prompt begins, which tokens end an
answer, and how a conversation is laid out.

Hugging Face folders keep this in files beside tokenizer.json, and so do run folders, with one key
of ours: `prompt_begins_with` in tokenizer_config.json is the token that a text to continue begins
with. Without it a release puts bos there (none if its `add_bos_token` is false), and a tokenizer of
ours eos, which parts the documents that we train on.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"

SETTINGS, GENERATION, TEMPLATE = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
BESIDE = (SETTINGS, GENERATION, TEMPLATE, "special_tokens_map.json", "config.json")
"""Files that are read; the first three are written as well."""
BEGINS = "prompt_begins_with"


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Conventions of using a tokenizer."""

    bos: str = BOS
    """'': there is none, as in Qwen's folders."""
    eos: str = EOS
    pad: str = PAD
    begins: str = EOS
    """Name of the token that a text to continue begins with; '': none."""
    ends: tuple[int, ...] = ()
    """Ids that end an answer; empty: the id of eos."""
    template: str = ""
    """Chat template (Jinja); '': none of its own."""

    def write(self, files: Mapping[str, str], ends: tuple[int, ...], pad: str) -> dict[str, str]:
        """Texts of the files that say so, over those that were read; `ends` and the name `pad`,
        unless it is '', written out."""
        settings = _json(files, SETTINGS) or {"tokenizer_class": "PreTrainedTokenizerFast"}
        known = {"bos_token": self.bos or None, "eos_token": self.eos, BEGINS: self.begins}
        known |= {"pad_token": pad} if pad else {}
        generation = _json(files, GENERATION) | {"eos_token_id": list(ends)}
        texts = {SETTINGS: _text(settings | known), GENERATION: _text(generation)}
        return texts | {name: files[name] for name in (TEMPLATE,) if name in files}


def read_conventions(files: Mapping[str, str]) -> Conventions:
    """The conventions that the files BESIDE a tokenizer.json give, by name -> text.

    ValueError for a file that is not JSON, ids that are none, and several templates without one
    named "default".
    """
    settings = _json(files, SETTINGS)
    named = _json(files, "special_tokens_map.json") | settings
    names = {name: _name(named, f"{name}_token") for name in ("bos", "eos", "pad")}
    names = {name: text for name, text in names.items() if text}
    released = "model_type" in _json(files, "config.json") or bool(settings)
    if "eos" in names:
        names.setdefault("bos", "")  # who names its tokens and no bos, as Qwen does, has none
    begins = names.get("bos", BOS) if released else names.get("eos", EOS)
    if settings.get("add_bos_token") is False:
        begins = ""
    begins = settings.get(BEGINS, begins)
    if not isinstance(begins, str):
        raise ValueError(f"{SETTINGS}: {BEGINS} is {begins!r}, not the name of a token")
    return Conventions(**names, begins=begins, ends=end_ids(files), template=_template(files))


def end_ids(files: Mapping[str, str]) -> tuple[int, ...]:
    """Tokens that end an answer, of generation_config.json, else config.json; () where neither
    names one. ValueError for what is no token id."""
    for name in (GENERATION, "config.json"):
        found = _json(files, name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None:
            known = tuple(i for i in ids if type(i) is int and 0 <= i < 2**31)
            if len(known) < len(ids):
                raise ValueError(f"{name}: eos_token_id is {found!r}, not a token id")
            return known
    return ()


def _template(files: Mapping[str, str]) -> str:
    if TEMPLATE in files:
        return files[TEMPLATE]
    found = _json(files, SETTINGS).get("chat_template") or ""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"{SETTINGS}: chat_template is no text, nor a list with one named 'default'; put the "
            f"template to use into {TEMPLATE}"
        )
    return found


def _name(settings: Mapping[str, Any], key: str) -> str:
    given = settings.get(key)
    given = given.get("content") if isinstance(given, dict) else given
    return given or ""


def _json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no object {{..}}")
    return found


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)
