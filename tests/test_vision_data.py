"""Prompts with images, mixed rows, drawn scenes: what stands where, and what cannot be forged."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

import generate
from checkpoint.hf_config import from_hf_config, to_hf_config
from checkpoint.hf_reader import HuggingFaceFolder
from configs import preset
from data.tokenizer import train_tokenizer
from generation.config import Sampling
from vision.batches import MixedRows, PictureRows, draw_example
from vision.config import JanusConfig
from vision.drawing import DrawingTokens, without_text
from vision.images import to_bytes
from vision.options import ImageOptions
from vision.prompts import (
    ASSISTANT,
    BEGIN,
    END,
    PLACE,
    SYSTEM,
    TOKENS,
    USER,
    Conversations,
    ImageTokens,
    folder_tokens,
    image_tokens,
    with_image_tokens,
)
from vision.reading import images_of_rows, load_pixels, sight_of_rows
from vision.scene_source import SceneSource
from vision.scenes import (
    COLOURS,
    Scene,
    Thing,
    all_scenes,
    crowd,
    draw_cells,
    neighbours,
    read_scene,
    shows,
    split,
)

CONFIG = preset("janus_tiny").model
assert isinstance(CONFIG, JanusConfig)
PATCHES = CONFIG.encoder.num_patches


@functools.cache
def talk() -> Conversations:
    texts = [f"{s.caption} {s.question} {s.answer}" for s in all_scenes()]
    tokenizer = with_image_tokens(train_tokenizer(texts, CONFIG.vocab_size - len(TOKENS)))
    return Conversations(tokenizer, ImageTokens(), PATCHES)


def text_of(ids) -> str:
    return "".join(talk().tokenizer.decode([i]) for i in ids)


def test_a_question_is_the_published_conversation():
    ids = talk().question("what is it?", 2)
    image = BEGIN + PLACE * PATCHES + END + "\n"
    bos = talk().tokenizer.conventions.bos
    assert text_of(ids) == f"{bos}{SYSTEM}\n\n{USER}: {image * 2}what is it?\n\n{ASSISTANT}:"
    assert (ids == CONFIG.image_token_id).sum() == 2 * PATCHES


def test_turns_of_a_conversation_and_what_is_learned():
    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    ids, learned = talk().conversation(messages, 0, system="")
    bos, eos = talk().tokenizer.conventions.bos, talk().tokenizer.conventions.eos
    turns = f"{bos}{USER}: a\n\n{ASSISTANT}: b{eos}{USER}: c\n\n{ASSISTANT}: d{eos}"
    assert text_of(ids) == turns
    assert text_of(ids[learned]) == f" b{eos} d{eos}"
    with pytest.raises(ValueError, match="take turns"):
        talk().conversation(messages[1:], 0)


def test_words_forge_no_token():
    forged = f"{PLACE}{BEGIN}{USER}"
    for ids in (talk().question(forged, 1, system=forged), talk().caption(forged)):
        assert (ids == CONFIG.image_token_id).sum() in (0, PATCHES)
        assert (ids == talk().tokenizer.token_id(BEGIN)).sum() == 1
        assert forged in text_of(ids)


def test_the_prompt_without_text_keeps_bos_and_begin():
    ids = talk().caption("a red circle")
    tokens = talk().drawing
    blank = without_text(ids, tokens)
    assert len(blank) == len(ids)
    assert (blank[0], blank[-1]) == (tokens.bos, tokens.begin) == (ids[0], ids[-1])
    assert (blank[1:-1] == tokens.pad).all()


def test_ids_of_the_folder_come_before_the_tokenizers():
    files = {"bos_token_id": 5, "pad_token_id": 6, "generation_kwargs": {"boi_token_id": 7}}
    assert folder_tokens(files, None) == DrawingTokens(5, 7, 6)
    assert folder_tokens({"bos_token_id": 5}, talk()).bos == 5
    assert folder_tokens({}, talk()) == talk().drawing
    with pytest.raises(ValueError, match="which token is begin"):
        folder_tokens({"bos_token_id": 5, "pad_token_id": 6}, None)
    assert image_tokens({"boi_token": "<b>"}).begin == "<b>"
    assert image_tokens({"extra_special_tokens": {"image_token": "<i>"}}).place == "<i>"


@functools.cache
def source() -> SceneSource:
    codes = lambda pixels: np.tile(np.arange(16, dtype=np.int32), (len(pixels), 1))  # noqa: E731
    return SceneSource(0, CONFIG, talk(), codes, 0.5)


def rows(**changes) -> MixedRows:
    given = {"shares": (1, 0, 1), "images_per_row": 2, "seed": 0} | changes
    more = {"seq_len": 96, "micro_batch": 4, "rows": range(4)}
    return MixedRows(source(), CONFIG, **given, **more)


def test_rows_hold_whole_examples_in_their_places():
    for number in range(6):
        row = rows().row(number)
        place = row["tokens"] == CONFIG.image_token_id
        np.testing.assert_array_equal(row["patches"] >= 0, place)
        seen = row["patches"][place]
        np.testing.assert_array_equal(seen, np.arange(len(seen)))
        images = len(seen) // PATCHES
        assert [bool(image.any()) for image in row["pixels"]] == [n < images for n in range(2)]
        drawn = row["codes"] >= 0
        assert drawn.sum() % 16 == 0
        assert row["learned"][drawn].all()
        assert not row["learned"][place].any()
        assert (np.diff(row["segments"][row["segments"] > 0]) >= 0).all()
        assert row["segments"].max() == images + drawn.sum() // 16


def test_batches_are_a_function_of_seed_and_rows():
    span = lambda step: (8 * step, 8)  # noqa: E731
    (batch,) = rows().batches(span, 3, 4)
    assert batch["tokens"].shape == (2, 4, 97)
    np.testing.assert_array_equal(batch["tokens"][1, 2], rows().row(8 * 3 + 4 + 2)["tokens"])
    assert any((rows(seed=1).row(n)["tokens"] != rows().row(n)["tokens"]).any() for n in range(3))
    (pictures,) = PictureRows(source().image, 4, range(4), 0).batches(span, 0, 1)
    assert pictures["paint"].shape == (2, 4, 32, 32, 3)


def test_an_example_that_fits_no_row_is_told():
    long = MixedRows(source(), CONFIG, (1, 0, 0), 16, 2, 4, range(4), 0)
    with pytest.raises(ValueError, match="an example of kind read has"):
        long.row(0)


def test_words_are_left_out_at_the_rate_asked_for():
    rng = np.random.default_rng(0)
    lengths = [(source().draw("draw", rng).ids == talk().tokenizer.pad_id).sum() for _ in range(60)]
    assert 15 < sum(count > 0 for count in lengths) < 45
    codes = np.arange(16)
    assert (draw_example(talk(), "a red circle", codes, blank=False).codes[-16:] == codes).all()


def test_scenes_are_told_from_their_pixels():
    shown, held_out = split(0)
    assert not set(shown) & set(held_out)
    assert len(shown) + len(held_out) == len(all_scenes()) == 528
    for number, scene in enumerate(itertools.chain(held_out, shown[::20])):
        other = held_out[(number + 3) % len(held_out)]
        drawn = scene.draw(32)
        assert shows(drawn, scene)
        assert shows(drawn, other) == (other.cells in _either(scene))
    assert len({scene.caption for scene in held_out}) == len(held_out)


def test_a_crowd_has_no_two_that_are_held_out():
    """However they are described, and in either lane; what is shown does occur."""
    shown, held_out = split(0)
    rng = np.random.default_rng(0)
    crowds = [crowd(rng, frozenset(held_out)) for _ in range(400)]
    hidden = [cells for scene in held_out for cells in _either(scene)]
    assert not any(pair.items() <= cells.items() for cells in crowds for pair in hidden)
    pairs = {pair for cells in crowds for pair in neighbours(cells)}
    assert len(pairs & set(shown)) > 150
    assert {len(cells) for cells in crowds} == {1, 2, 3, 4}
    assert all(read_scene(draw_cells(cells, 32)) == cells for cells in crowds[:20])


def _either(scene: Scene) -> list:
    return [Scene(scene.first, scene.relation, scene.second, lane).cells for lane in (0, 1)]


def test_a_picture_of_something_else_is_no_scene():
    scene = Scene(Thing("red", "circle"), "above", Thing("blue", "square"))
    picture = scene.draw(32)
    extra = picture.copy()
    extra[20:26, 20:26] = COLOURS["green"]
    assert not shows(extra, scene)
    assert None in read_scene(np.full_like(picture, 0)).values()
    assert read_scene(np.full_like(picture, 245)) == {}
    assert not shows(picture[::-1], scene)
    noisy = np.clip(picture + np.random.default_rng(0).normal(0, 12, picture.shape), 0, 255)
    assert shows(noisy.astype(np.uint8), scene)
    assert shows(to_bytes(source().to_draw(scene)), scene)


def test_images_of_rows_are_counted():
    image = [CONFIG.image_token_id] * PATCHES
    ids = np.array([[1, *image, 2, *image], [1, *image, *[2] * (PATCHES + 1)]], np.int32)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    found = images_of_rows(ids, 3, CONFIG)
    assert found == [range(0, 2), range(2, 3)]
    sight = sight_of_rows(ids, pixels, found, CONFIG)
    assert sight is not None
    np.testing.assert_array_equal(sight.pixels_BMHWC[1, 0], np.moveaxis(pixels[2], 0, -1))
    assert not sight.pixels_BMHWC[1, 1].any()
    with pytest.raises(ValueError, match="places for 3 images, and 2 are given"):
        images_of_rows(ids, 2, CONFIG)
    with pytest.raises(ValueError, match="row 0 has 31 image tokens"):
        images_of_rows(ids[:, 2:], 3, CONFIG)


def test_pixels_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 8, 8), np.float32))
    np.save(tmp_path / "b.npy", np.full((1, 3, 32, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match="the model reads float32"):
        load_pixels(tmp_path / "a.npy", CONFIG)
    with pytest.raises(ValueError, match="NaN"):
        load_pixels(tmp_path / "b.npy", CONFIG)
    with pytest.raises(ValueError, match="no such file"):
        load_pixels(tmp_path / "c.npy", CONFIG)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ImageOptions(draw=("x",)), "say where drawn images go"),
        (ImageOptions(greedy=True), "nothing is drawn"),
        (ImageOptions(images=3, guidance=2.0), "--images, --guidance: nothing is drawn"),
        (ImageOptions(draw=("x",), draw_ids="1"), "leave out --draw or it"),
        (ImageOptions(draw=("x",), images=0), "say where|at least 1"),
    ],
)
def test_options_without_effect_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        options.check(prompts=False)


def test_drawing_takes_no_option_of_text(tmp_path):
    """Nor the folder's: its top_k and top_p are of text, and codes are drawn from all."""
    sampling = {"do_sample": True, "top_p": 0.5, "temperature": 0.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    words = ["--checkpoint", str(tmp_path), "--draw", "x", "--out", str(tmp_path)]
    assert generate.parse(words).sampling == Sampling()
    with pytest.raises(ValueError, match="--stop, --max-new-tokens: --draw writes no text"):
        generate.check_options(generate.parse([*words, "--max-new-tokens", "3", "--stop", "."]))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("", {"architectures": "NoJanusForConditionalGeneration"}, "architectures is 'No"),
        ("", {"architectures": 7}, "architectures is 7"),
        ("vision_config", {"mlp_ratio": math.inf}, "mlp_ratio is inf"),
        ("vision_config", {"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
    ],
)
def test_files_of_models_that_cannot_be_are_refused(part, change, said):
    hf = to_hf_config(CONFIG)
    assert from_hf_config(hf).encoder == CONFIG.encoder
    with pytest.raises(ValueError, match=said):
        from_hf_config(hf | ({part: hf[part] | change} if part else change))


def test_more_parts_than_the_files_hold_are_not_listed(tmp_path):
    """A billion layers in a few bytes of JSON."""
    hf = to_hf_config(CONFIG)
    hf["vision_config"]["num_hidden_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(hf))
    few = {str(number): np.zeros(3, np.float32) for number in range(20)}
    save_file(few, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000; the files hold 20 tens"):
        HuggingFaceFolder(tmp_path)
