"""What transformers makes of conversations and texts, for tests/test_chat_templates.py.

    .venv-reference/bin/python tests/reference/hf_chat.py asked.json > ids.json

asked.json: a list of {"folder", "messages", "options"} or {"folder", "text"}. Ids of each go to
standard output; those of a text without what the tokenizer puts around it.
"""

import json
import pathlib
import sys

from transformers import PreTrainedTokenizerFast


def ids_of(asked: dict) -> list[int]:
    """Ids of a conversation with the prompt for its answer, or of a text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(asked["folder"])
    if "text" in asked:
        return tokenizer(asked["text"], add_special_tokens=False)["input_ids"]
    text = tokenizer.apply_chat_template(
        asked["messages"], tokenize=False, add_generation_prompt=True, **asked["options"]
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


asked = json.loads(pathlib.Path(sys.argv[1]).read_text("utf-8"))
print(json.dumps([ids_of(one) for one in asked]))
