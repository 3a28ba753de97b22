"""Trained and loaded tokenizers: layout of the vocabulary, losslessness, special tokens as text."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from conftest import ROOT
from tokenizers import models, pre_tokenizers

from data.tokenizer import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    LAST,
    MIN_VOCAB,
    PAD,
    FimTokens,
    NoTokenError,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from rl.tasks.characters import character_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "the cat and the hat, the bat\r\n"] * 3
HARD = ["", " ", "\x00\x01", "a\r\nb\r\n\r\n", "12345", "日本語テキスト", "🙂é\ufeff", "\t  x  \n"]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 300)


def test_special_tokens_lie_where_deepseeks_do(trained):
    assert trained.vocab_size == 300
    assert [trained.token_id(t) for t in (BOS, EOS, PAD)] == [0, 1, 2]
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)
    assert [trained.token_id(t) for t in LAST] == list(range(300 - len(LAST), 300))
    fim = (trained.token_id(t) for t in (FIM_BEGIN, FIM_HOLE, FIM_END))
    assert trained.fim == FimTokens(*fim)


def test_names_of_special_tokens_are_deepseeks():
    assert BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert FIM_HOLE == "<\uff5cfim\u2581hole\uff5c>"
    assert LAST[-1] == "<\uff5ctool\u2581sep\uff5c>"
    assert LAST[:2] == ("<think>", "</think>")
    assert LAST[7] == "<|EOT|>"
    assert len(LAST) == 17


def test_a_corpus_with_few_merges_is_filled_with_place_holders():
    tokenizer = train_tokenizer(["ab"], MIN_VOCAB + 10)
    assert tokenizer.vocab_size == MIN_VOCAB + 10
    assert tokenizer.token_id("<｜place▁holder▁no▁8｜>") == MIN_VOCAB + 10 - len(LAST) - 1
    assert tokenizer.encode("ab").tolist() == [3 + 256]


def test_too_small_a_vocabulary_is_an_error_with_the_numbers():
    assert train_tokenizer(TEXTS, MIN_VOCAB).vocab_size == MIN_VOCAB
    with pytest.raises(ValueError, match=f"--data.vocab-size 100 .* at least {MIN_VOCAB}"):
        train_tokenizer(TEXTS, 100)


@pytest.mark.parametrize("text", TEXTS[:2] + HARD)
def test_encoding_is_lossless_and_bytes_add_up(trained, text):
    ids = trained.encode(text)
    assert ids.dtype == np.int32
    assert trained.decode(ids) == text
    assert trained.byte_lengths[ids].sum() == len(text.encode())


def test_batch_equals_single(trained):
    batch = trained.encode_batch(TEXTS + HARD)
    for text, ids in zip(TEXTS + HARD, batch, strict=True):
        np.testing.assert_array_equal(ids, trained.encode(text))


@pytest.mark.parametrize("name", [BOS, EOS, PAD, *LAST])
def test_the_text_of_a_special_token_stays_text(trained, name):
    text = f"say {name} twice: {name}"
    ids = trained.encode(text)
    assert trained.token_id(name) not in ids
    assert trained.byte_lengths[ids].min() > 0  # no special token at all
    assert trained.decode(ids) == text
    assert (trained.encode(text, special=True) == trained.token_id(name)).sum() == 2


def test_think_survives_decoding_without_special_tokens(trained):
    ids = trained.encode(f"{BOS}<think>a</think>b{EOS}", special=True)
    assert trained.decode(ids, skip_special=True) == "<think>a</think>b"
    assert trained.decode(ids) == f"{BOS}<think>a</think>b{EOS}"


def test_pre_tokeniser_is_deepseeks(trained):
    """Pieces of the published pattern: digits by three, punctuation takes line breaks along."""
    pre = tokenizers.Tokenizer.from_str(trained.json).pre_tokenizer
    pieces = lambda text: [piece for piece, _ in pre.pre_tokenize_str(text)]  # noqa: E731
    assert pieces("12345") == ["123", "45"]
    assert pieces("x = 1;\n\ny") == ["x", "Ġ=", "Ġ", "1", ";ĊĊ", "y"]
    assert pieces("_name don't") == ["_name", "Ġdon", "'t"]
    assert len(pieces("日本語abc")) == 2


def test_training_is_deterministic_over_processes(trained):
    program = (
        f"from data.tokenizer import train_tokenizer\nprint(train_tokenizer({TEXTS!r}, 300).sha256)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == trained.sha256


# ---- Loading -------------------------------------------------------------------------------------


def test_load_gives_the_same_tokenizer(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.json, "utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.sha256 == trained.sha256
    assert loaded.fim == trained.fim
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), trained.encode(TEXTS[0]))


def test_added_tokens_that_are_not_special_stay_text_too(trained, tmp_path):
    """DeepSeek's file marks most of its control tokens `special: false`."""
    spec = json.loads(trained.json)
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    ids = loaded.encode(f"a{EOS}<think>b")
    assert not {loaded.eos_id, loaded.token_id("<think>")} & set(ids.tolist())
    assert loaded.decode(ids) == f"a{EOS}<think>b"


def test_a_post_processor_puts_nothing_around_documents(trained, tmp_path):
    spec = json.loads(trained.json)
    part = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}  # noqa: E731
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, part("A", 0)],
        "pair": [part("A", 0), part("B", 1)],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }  # fmt: skip
    spec["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for special in (False, True):
        np.testing.assert_array_equal(loaded.encode(TEXTS[1], special), trained.encode(TEXTS[1]))


def word_level(tokens: list[str], extra: list[str]) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(extra)
    return tokenizer


def test_other_names_come_from_tokenizer_config(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(word_level(["<unk>", "hello"], ["<s>", "</s>"]).to_str())
    with pytest.raises(ValueError, match=r"no token '<｜begin.*tokenizer_config\.json"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})
    )
    loaded = load_tokenizer(path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 3, 3)
    assert loaded.fim is None
    assert loaded.byte_lengths is None
    assert loaded.vocab_size == 4


def test_a_model_that_makes_special_tokens_of_text_is_refused():
    tokenizer = word_level([BOS, EOS, "hello"], [BOS, EOS])
    loaded = Tokenizer(tokenizer.to_str())
    assert loaded.encode("hello").tolist() == [2]
    with pytest.raises(ValueError, match="turns plain text into the special token"):
        loaded.encode(f"hello {EOS}")


def test_unreadable_tokenizers_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json is no file"):
        load_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_character_without_a_token_is_named():
    tokenizer = character_tokenizer(("a", "b"))
    assert len(tokenizer.encode("abba")) == 4
    for read in (tokenizer.encode, lambda text: tokenizer.encode(text, special=True)):
        with pytest.raises(NoTokenError, match="no token for 'c'"):
            read("abcd")


# ---- Added tokens and conventions ----------------------------------------------------------------


def with_added(trained, *names, pop=()):
    """The file's JSON with added tokens that are not special; `pop` are taken from the model."""
    spec = json.loads(trained.json)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for name in (*names, *pop):
        index = spec["model"]["vocab"].pop(name) if name in pop else 300 + names.index(name)
        spec["added_tokens"].append({"id": index, "content": name, **flags})
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("added", "pop", "texts"),
    [
        (("[CUSTOM]", "<tools>", "    "), (), ("a [CUSTOM] b", "<tools>x</tools>", "if:\n    x")),
        (("ab",), (), ("cab", "a b")),
        ((), ("õ", "÷"), ("x÷y", "aõb", "\U0001f5f5")),
    ],
)
def test_added_tokens_are_found_in_text_as_tokenizer_json_says(trained, added, pop, texts):
    text = with_added(trained, *added, pop=pop)
    ours, full = Tokenizer(text), tokenizers.Tokenizer.from_str(text)
    for words in (*texts, f"x{EOS}"):
        wanted = full.encode(words.replace(EOS, ""), add_special_tokens=False).ids
        ids = ours.encode(words).tolist()
        assert ids == wanted if EOS not in words else ours.eos_id not in ids
        if not pop:  # a byte that is a token of its own is decoded as a byte
            assert ours.decode(ids) == words
        if EOS not in words:
            assert ours.byte_lengths[ids].sum() == len(words.encode())


def test_names_of_marks_in_a_text_are_told(trained):
    assert trained.marks_in(f"a{EOS}b<think>") == ["<think>", EOS]
    assert trained.marks_in("a <b> | c") == []


@pytest.mark.parametrize(
    ("files", "first"),
    [
        ({}, [1]),
        ({"config.json": {"model_type": "deepseek_v3"}}, [0]),
        ({"tokenizer_config.json": {"bos_token": {"content": BOS}, "eos_token": EOS}}, [0]),
        ({"tokenizer_config.json": {"add_bos_token": True}}, [0]),
        ({"tokenizer_config.json": {"add_bos_token": False}}, []),
        ({"tokenizer_config.json": {"prompt_begins_with": EOS}}, [1]),
        ({"tokenizer_config.json": {"prompt_begins_with": ""}}, []),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": EOS}}, []),  # as Qwen's
        ({"tokenizer_config.json": {"eos_token": EOS}, "config.json": {"model_type": "qwen2"}}, []),
        ({"special_tokens_map.json": {"bos_token": EOS, "eos_token": BOS}}, [0]),
    ],
)
def test_a_text_to_continue_begins_by_one_rule_that_is_kept(trained, files, first):
    tokenizer = Tokenizer(trained.json, {name: json.dumps(x) for name, x in files.items()})
    for one in (tokenizer, Tokenizer(tokenizer.json, tokenizer.files)):
        assert one.encode_prompt("hat").tolist() == [*first, *trained.encode("hat").tolist()]
    learned = tokenizer.of_documents()
    assert learned.encode_prompt("")[0] == learned.eos_id
    marked = tokenizer.encode_prompt(f"{BOS}hat", special=True).tolist()
    assert marked.count(0) == 1


def test_ends_of_generation_config_count(trained):
    def ends(**files):
        return Tokenizer(trained.json, {f"{n}.json": json.dumps(x) for n, x in files.items()})

    assert ends().end_ids == (1,)
    assert ends(config={"eos_token_id": 5}).end_ids == (5,)
    both = ends(config={"eos_token_id": 5}, generation_config={"eos_token_id": [7, 1], "top_p": 1})
    assert (both.end_ids, both.end_id) == ((7, 1), 1)
    assert json.loads(both.files["generation_config.json"]) == {"eos_token_id": [7, 1], "top_p": 1}
    for end in ("<end>", 10**12):
        with pytest.raises(ValueError, match="not a token id"):
            ends(generation_config={"eos_token_id": end})
    for text in ("{", "[" * 100_000):
        with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
            Tokenizer(trained.json, {"generation_config.json": text})


def test_a_beginning_without_a_token_is_named(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.json, "utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"prompt_begins_with": "[GO]"}')
    with pytest.raises(ValueError, match=r"no token '\[GO\]'"):
        load_tokenizer(tmp_path / "tokenizer.json")
