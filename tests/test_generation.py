"""Decoding from the latent cache against the full forward pass; sampling; speculation; layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generation.config import Sampling
from generation.decode import make_decoder
from generation.engine import Generator, padded_length
from generation.sampling import probabilities
from generation.speculate import accept_or_redraw
from model.blueprint import bind
from model.costs import cache_bytes_per_token
from model.recipe import Recipe
from model.transformer import Tokens
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout
from tests.small_model import CONFIG, weights

RECIPE = Recipe()
ONE = MeshConfig()
GREEDY = Sampling(temperature=0)
NEW = 24
ATOL = 1e-4
"""fp32 logits of order 1 to 4: another order of sums, in both forms of attention."""
PROMPTS = [
    np.random.default_rng(n).integers(3, CONFIG.vocab_size, n).astype(np.int32) for n in (5, 1, 70)
]


@functools.cache
def generator(mesh: MeshConfig = ONE) -> Generator:
    devices = jax.devices()[: 1 if mesh == ONE else 8]
    return Generator(CONFIG, RECIPE, Layout(make_mesh(mesh, devices)))


@functools.cache
def prepared(mesh: MeshConfig = ONE):
    made = generator(mesh)
    placed = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), weights(), made.abstract_weights
    )
    return made.prepare(placed)


def texts(sampling, *, speculate=False, mesh=ONE, eos=(), prompts=PROMPTS, new=NEW):
    session = generator(mesh).start(prepared(mesh), prompts, sampling, new, eos, speculate)
    rows = [[] for _ in prompts]
    while not session.done:
        for row, ids in zip(rows, session.advance(), strict=True):
            row += ids.tolist()
    return rows, session.stats


@functools.cache
def teacher_forced(config=CONFIG):
    """(ids [1, T]) -> logits [T, V], of the model as it is trained."""

    @jax.jit
    def forward(trees, ids_BT):
        model = bind(config, trees["params"], trees["router_bias"])
        positions_BT = jnp.arange(ids_BT.shape[1])[None]
        return model(Tokens(ids_BT, positions_BT, None), RECIPE).hidden_BTD @ model.head_kernel()

    return lambda ids: np.asarray(forward(weights(), jnp.asarray(ids)[None]))[0]


def test_every_decoded_position_has_the_logits_of_the_full_forward_pass():
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, 48).astype(np.int32)
    decoder = make_decoder(CONFIG, prepared(), RECIPE, mtp=False)
    start, positions = 9, jnp.arange(48)[None]
    hidden, cache, _ = jax.jit(lambda i, p: decoder.read(i, p, 64))(
        ids[None, :start], positions[:, :start]
    )
    found = [decoder.logits(hidden[0])]
    extend = jax.jit(decoder.read)
    for at in range(start, 48, 3):  # three tokens at a time
        part = slice(at, at + 3)
        hidden, cache, _ = extend(ids[None, part], positions[:, part], cache)
        found.append(decoder.logits(hidden[0]))
    np.testing.assert_allclose(np.concatenate(found), teacher_forced()(ids), rtol=0, atol=ATOL)


@pytest.mark.slow
def test_bf16_logits_are_those_of_the_full_forward_pass_in_fp32():
    """Every token goes to every expert here: a near tie that rounding decides is no error."""
    config = dataclasses.replace(CONFIG, experts_per_token=8, groups_per_token=4)
    recipe = Recipe("bfloat16")
    layout = Layout(make_mesh(ONE, jax.devices()[:1]))
    half = Generator(config, recipe, layout).prepare(jax.tree.map(jnp.asarray, weights()))
    moe = half["params"]["moe_layers"][0]["moe"]
    assert moe["w_up"][0].dtype == jnp.bfloat16
    assert moe["router"]["kernel"].dtype == jnp.float32
    decoder = make_decoder(config, half, recipe, mtp=False)
    ids, positions = jnp.arange(3, 27, dtype=jnp.int32)[None], jnp.arange(24)[None]
    prefill = jax.jit(lambda i, p: decoder.read(i, p, 64))
    hidden, cache, _ = prefill(ids[:, :20], positions[:, :20])
    assert cache[0].dtype == jnp.bfloat16
    last, _, _ = jax.jit(decoder.read)(ids[:, 20:], positions[:, 20:], cache)
    found = jnp.concatenate([decoder.logits(hidden[0]), decoder.logits(last[0])])
    wanted = teacher_forced(config)(ids[0])
    # 8 bits per rounding, some tens of roundings, logits of order 1 to 4.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1)


def test_cache_holds_latents_only():
    held = prepared()
    _, cache, _ = jax.eval_shape(
        lambda: make_decoder(CONFIG, held, RECIPE, False).read(
            jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 8), jnp.int32), 64
        )
    )
    per_token = sum(entry.size for entry in cache) / (2 * 64)
    assert per_token * 2 == cache_bytes_per_token(CONFIG)


@pytest.mark.slow
def test_greedy_text_is_the_argmax_of_the_full_forward_pass():
    rows, stats = texts(GREEDY)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        logits = teacher_forced()(np.concatenate([prompt, row]).astype(np.int32))
        assert row == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert stats.prefill_tokens == sum(map(len, PROMPTS))
    assert stats.decoded_tokens == stats.main_passes == len(PROMPTS) * (NEW - 1)


def test_speculation_does_not_change_greedy_text():
    assert texts(GREEDY, speculate=True)[0] == texts(GREEDY)[0]


@pytest.mark.parametrize("speculate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_layout_gives_the_text_of_one_device(speculate):
    cube = MeshConfig(fsdp=2, expert=2, tensor=2)
    assert texts(GREEDY, mesh=cube, speculate=speculate)[0] == texts(GREEDY)[0]


@pytest.mark.slow
def test_rows_do_not_depend_on_their_neighbours():
    sampling = Sampling(temperature=1.0, seed=3)
    assert texts(sampling)[0][0] == texts(sampling, prompts=PROMPTS[:1])[0][0]
    assert texts(sampling)[0] == texts(sampling)[0]
    assert texts(sampling)[0] != texts(dataclasses.replace(sampling, seed=4))[0]


@pytest.mark.parametrize("speculate", [False, True])
def test_rows_end_at_eos_and_at_the_limit(speculate):
    whole, _ = texts(GREEDY)
    eos = whole[0][7]
    rows, _ = texts(GREEDY, eos=(eos,), speculate=speculate)
    for row, full in zip(rows, whole, strict=True):
        end = full.index(eos) + 1 if eos in full else NEW
        assert row == full[:end]
    assert all(len(row) == 1 for row in texts(GREEDY, new=1, speculate=speculate)[0])


def good_draft():
    """Weights whose next token is a fixed permutation of the last, for model and MTP alike."""
    trees = jax.tree.map(np.array, weights())
    params = trees["params"]
    for stack in (params["dense_layers"], params["moe_layers"], params["mtp"]["block"]):
        stack["attn"]["w_o"][:] = 0
        ffn = stack.get("mlp") or stack["moe"]
        ffn["w_down"][:] = 0
        if "shared" in ffn:
            ffn["shared"]["w_down"][:] = 0
    d = CONFIG.hidden_size
    order = np.random.default_rng(5).permutation(CONFIG.vocab_size)
    rows = np.random.default_rng(6).choice([-1.0, 1.0], (CONFIG.vocab_size, d)).astype(np.float32)
    params["embed"]["table"] = rows
    params["head"]["kernel"] = np.zeros((d, CONFIG.vocab_size), np.float32)
    params["head"]["kernel"][:, order] = rows.T
    params["mtp"]["proj"]["kernel"][:] = np.concatenate([np.eye(d), np.zeros((d, d))])
    return trees


@pytest.mark.slow
def test_a_good_draft_gives_nearly_two_tokens_a_pass():
    made = generator()
    session = made.start(
        made.prepare(jax.tree.map(jnp.asarray, good_draft())), PROMPTS, GREEDY, 41, (), True
    )
    while not session.done:
        session.advance()
    stats = session.stats
    assert stats.accepted == stats.drafted
    assert stats.decoded_tokens / stats.main_passes >= 1.6


# ---- distributions -------------------------------------------------------------------------------

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), np.array([0.5, 0.25, 0.15, 0.1]) ** 2 / 0.345),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (Sampling(top_p=1e-6), [1, 0, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_probabilities(sampling, expected):
    np.testing.assert_allclose(probabilities(LOGITS, sampling)[0], expected, atol=1e-6)


@pytest.mark.parametrize("draft", [[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.15, 0.1], [0, 0, 0, 1.0]])
def test_speculation_keeps_the_distribution(draft):
    """Frequencies of 40,000 draws; four standard deviations are at most 0.01."""
    n, p = 40_000, jnp.array([0.5, 0.25, 0.15, 0.1])
    q = jnp.array(draft)
    keys = jax.random.split(jax.random.key(0), (3, n))
    drafts = jax.vmap(lambda k: jax.random.categorical(k, jnp.log(q)))(keys[0])
    wide = lambda x: jnp.broadcast_to(x, (n, 4))  # noqa: E731
    tokens, accepted = accept_or_redraw(keys[1], keys[2], drafts, wide(q), wide(p), Sampling())
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / n, p, atol=0.01)
    np.testing.assert_allclose(accepted.mean(), jnp.minimum(p, q).sum(), atol=0.01)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [np.zeros(0, np.int32)]}, "prompt 0 is empty"),
        ({"prompts": [np.array([1, 320], np.int32)]}, r"token 320; the vocabulary has ids 0..319"),
        ({"prompts": [np.zeros(500, np.int32)]}, "500 tokens, with 24 new ones 524"),
        ({"new": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_requests_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        texts(GREEDY, **change)


@pytest.mark.parametrize(
    "field", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_bad_sampling_is_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Sampling(**field)


def test_prompts_are_padded_to_few_lengths_and_by_little():
    lengths = [padded_length(n) for n in range(1, 4097)]
    assert all(length >= n and length % 16 == 0 for n, length in enumerate(lengths, 1))
    assert max(1 - n / length for n, length in enumerate(lengths, 1) if n >= 64) < 0.2
    assert len(set(lengths)) == 4 + 4 * 6  # to 64, and for each doubling to 4,096
