"""Redundant experts while generating: the same text and logits, less load on the busiest device."""

import dataclasses
import functools
import json
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generate
from generation import experts
from generation.config import ExpertOptions, Sampling
from generation.decode import expert_load, make_decoder, unstack
from generation.engine import Generator
from generation.replicas import Copies, Replicas
from model import moe
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.experts.eplb import place_experts
from sharding.mesh import make_layout
from sharding.partition import use_layout
from tests.small_model import CONFIG, run_folder, weights

RECIPE = Recipe()
ONE = MeshConfig()
GREEDY = Sampling(temperature=0)
E, ROWS = CONFIG.num_experts, CONFIG.num_moe_layers + CONFIG.mtp_depth
LOAD = np.random.default_rng(0).gamma(0.5, 100.0, (ROWS, E))
PROMPTS = [
    np.random.default_rng(n).integers(3, CONFIG.vocab_size, n).astype(np.int32) for n in (9, 4)
]
IDS = np.random.default_rng(1).integers(3, CONFIG.vocab_size, (4, 16)).astype(np.int32)


def mesh_devices(mesh: MeshConfig) -> int:
    return mesh.data * mesh.expert * mesh.tensor


@functools.cache
def layout(mesh: MeshConfig):
    return make_layout(mesh, jax.devices()[: mesh_devices(mesh)])


def placed(mesh: MeshConfig, extra: int):
    return place_experts(LOAD, E + extra, CONFIG.num_expert_groups, mesh.expert_nodes, mesh.expert)


@functools.cache
def loaded(mesh: MeshConfig = ONE, extra: int = 0):
    """A generator that counts, and its weights."""
    placement = placed(mesh, extra) if extra else None
    made = Generator(CONFIG, RECIPE, layout(mesh), placement, count_load=True)
    trees = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), weights(), made.abstract_weights
    )
    return made, made.prepare(trees)


@functools.cache
def text(mesh=ONE, extra=0, speculate=False):
    """Ids of every row, and the session."""
    made, held = loaded(mesh, extra)
    session = made.start(held, PROMPTS, GREEDY, 12, (), speculate)
    rows = [[] for _ in PROMPTS]
    while not session.done:
        for row, ids in zip(rows, session.advance(), strict=True):
            row += ids.tolist()
    return rows, session


@functools.cache
def logits(mesh: MeshConfig = ONE, extra: int = 0) -> np.ndarray:
    """Of IDS, prompts of 12 tokens and then the last four."""
    return logits_of(*loaded(mesh, extra))


def logits_of(made: Generator, held) -> np.ndarray:
    @jax.jit
    def run(held, ids_BT):
        with use_layout(made.layout):
            decoder = make_decoder(CONFIG, held, RECIPE, mtp=False)
            at_BT = jnp.broadcast_to(jnp.arange(16), ids_BT.shape)
            first, cache, _ = decoder.read(ids_BT[:, :12], at_BT[:, :12], 64)
            last, _, _ = decoder.read(ids_BT[:, 12:], at_BT[:, 12:], cache)
            hidden = jnp.concatenate([first, last], axis=1)
            return hidden @ decoder.head.kernel[...]

    return np.asarray(run(held, IDS))


HERE = pathlib.Path(generate.__file__).parent
SLOW = pytest.mark.slow
LAYOUTS = [
    pytest.param(ONE, 3, id="one", marks=SLOW),
    pytest.param(MeshConfig(expert=2), 4, id="two", marks=SLOW),
    pytest.param(MeshConfig(expert=4, expert_nodes=2), 4, id="nodes", marks=SLOW),
    pytest.param(MeshConfig(expert=4), 12, id="four", marks=SLOW),
    pytest.param(MeshConfig(expert=2, tensor=2, data=2), 2, id="cube", marks=SLOW),
    pytest.param(
        MeshConfig(expert=4, expert_nodes=2, exchange_capacity=1.0), 8, id="capacity", marks=SLOW
    ),
    pytest.param(MeshConfig(expert=4, exchange="gather"), 4, id="gather", marks=SLOW),
]


@pytest.mark.parametrize(("mesh", "extra"), LAYOUTS)
def test_logits_are_those_without_copies(mesh, extra):
    np.testing.assert_allclose(logits(mesh, extra), logits(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_stacked_copies_as_on_a_gpu_give_the_same_logits():
    mesh = MeshConfig(expert=4, expert_nodes=2)
    made, _ = loaded(mesh, 4)
    trees = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), weights(), made.abstract_weights
    )
    copies = Copies(placed(mesh, 4), made.layout)
    held = unstack(
        CONFIG, trees["params"], trees["router_bias"], jnp.dtype("float32"), True, None, copies
    )
    found = logits_of(made, held)
    np.testing.assert_allclose(found, logits(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "extra", "speculate"),
    [
        pytest.param(*layout.values, speculate, id=f"{layout.id}-{speculate}")
        for layout, speculate in zip(LAYOUTS[1:4], (True, False, True), strict=True)
    ],
)
def test_greedy_text_is_that_without_copies(mesh, extra, speculate):
    assert text(mesh, extra, speculate)[0] == text()[0]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("mesh", [MeshConfig(expert=4, expert_nodes=2), ONE])
def test_weights_are_laid_out_by_the_placement(mesh, apart):
    """Apart as a CPU has them, stacked as a GPU; of one shard, copies take no memory."""
    placement = placed(mesh, 4)
    copies, names = Copies(placement, layout(mesh)), moe.W_IN
    stack = weights()["params"]["moe_layers"]["moe"]["w_up"][0]
    axes = loaded(mesh)[0].abstract_weights["params"]["moe_layers"]["moe"]["w_up"].sharding
    with use_layout(layout(mesh)):
        w_EXY = jax.jit(lambda x: x[0], out_shardings=None)(jax.device_put(stack[None], axes))
    found = copies.weights(w_EXY, 1, names, mesh.expert if apart else None)
    wanted = stack[placement.expert_of_LR[1]]
    if not apart:
        assert isinstance(found, jax.Array)
        np.testing.assert_array_equal(found, wanted)
        shapes = {shard.data.shape[0] for shard in found.addressable_shards}
        assert shapes == {(E + 4) // mesh.expert}
        return
    assert isinstance(found, tuple)
    assert len(found) == (E + 4) // mesh.expert
    joined = np.stack([np.asarray(w) for w in found], axis=1).reshape(E + 4, *found[0].shape[1:])
    np.testing.assert_array_equal(joined.swapaxes(1, 2), wanted)
    assert {shard.data.shape[0] for w in found for shard in w.addressable_shards} == {1}
    if mesh.expert == 1:
        assert len({id(w) for w in found}) == E


# ---- which copy ----------------------------------------------------------------------------------


def test_tokens_share_the_copies_of_an_expert_evenly():
    placement = placed(MeshConfig(expert=4), 12)
    replicas = Replicas(*(jnp.asarray(table[0]) for table in placement[1:]))
    rng = np.random.default_rng(3)
    ids = rng.permuted(np.tile(np.arange(E), (64, 50, 1)), axis=-1)[..., :2]
    chosen = np.asarray(replicas.choose(jnp.asarray(ids)))
    np.testing.assert_array_equal(placement.expert_of_LR[0][chosen], ids)
    tokens = np.bincount(chosen.reshape(-1), minlength=E + 12)
    mean = np.bincount(ids.reshape(-1), minlength=E) / placement.counts_LE[0]
    # Five standard deviations of a draw.
    expected = mean[placement.expert_of_LR[0]]
    assert (abs(tokens - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("batch", [1, 16])
def test_a_batch_of_one_kind_and_a_lone_row_prefer_no_copy(batch):
    replicas = Replicas(
        jnp.array([[0, 5], [1, -1], [2, -1], [3, -1], [4, -1]]), jnp.array([2] + [1] * 4)
    )
    steps = [jnp.array([[[0, 1 + step % 4]]] * batch) for step in range(8)]
    chosen = np.concatenate([np.asarray(replicas.choose(ids))[..., 0] for ids in steps])
    assert (chosen == 0).sum() == (chosen == 5).sum() == 4 * batch


@pytest.mark.slow
def test_the_busiest_device_has_less_to_do(monkeypatch):
    """Choices counted where they are exchanged: a router that prefers few experts, and copies by
    the load of other text."""
    skewed = jax.tree.map(np.array, weights())
    skewed["router_bias"]["moe_layers"]["moe"]["router"]["bias"][:, :3] += 0.3
    seen: list[jax.Array] = []
    plain = moe.exchange

    def watched(x_ND, ids_NK, *rest):
        seen.append(ids_NK)
        return plain(x_ND, ids_NK, *rest)

    monkeypatch.setattr(moe, "exchange", watched)

    def choices(placement, ids_BT) -> np.ndarray:
        """Copies, or experts, that each layer's tokens go to [layers, rows of text, ..]."""
        made = Generator(CONFIG, RECIPE, layout(ONE), placement)
        held = made.prepare(jax.tree.map(jnp.asarray, skewed))

        @jax.jit
        def run(held, ids_BT):
            seen.clear()
            decoder = make_decoder(CONFIG, held, RECIPE, mtp=False)
            decoder.read(ids_BT, jnp.broadcast_to(jnp.arange(64), ids_BT.shape), 64)
            return jnp.stack(seen)

        return np.asarray(run(held, ids_BT)).reshape(-1, len(ids_BT), 64, 2)

    def count(ids, num: int) -> np.ndarray:
        return np.stack([np.bincount(layer.reshape(-1), minlength=num) for layer in ids])

    def busiest(tokens):
        by_device = tokens.reshape(len(tokens), 4, -1).sum(-1)
        return by_device.max(1) / by_device.mean(1)

    texts = np.random.default_rng(4).integers(3, CONFIG.vocab_size, (16, 64)).astype(np.int32)
    plain_ids = choices(None, texts)
    load = count(plain_ids[:, :8], E)
    load = np.concatenate([load, load[:1]])  # no MTP module runs here
    placement = place_experts(load, E + 4, CONFIG.num_expert_groups, 2, 4)
    tokens = count(plain_ids[:, 8:], E)
    before = busiest(tokens)
    after = busiest(count(choices(placement, texts[8:]), E + 4))
    assert (before > 2).all()
    assert (after < 0.75 * before).all()
    of_layers = type(placement)(*(table[:2] for table in placement))
    assert after.max() == pytest.approx(experts.busiest(tokens, of_layers, 4), abs=0.05)


# ---- counting ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_load_is_counted_by_expert_whatever_the_copies():
    """Prompts without padding and rows that run: K choices each, of the text that a layer read."""
    _, session = text(MeshConfig(expert=4, expert_nodes=2), 4, True)
    load = session.expert_load
    read = sum(map(len, PROMPTS)) + 2 * session.stats.main_passes
    assert load.shape == (ROWS, E)
    assert load.sum(1).tolist() == [CONFIG.experts_per_token * read] * ROWS


@pytest.mark.slow
def test_counted_load_is_that_of_the_full_forward_pass():
    rows, session = text()
    _, held = loaded()
    decoder = make_decoder(CONFIG, held, RECIPE, mtp=False)
    total = np.zeros((ROWS - 1, E))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = jnp.asarray([*prompt, *row[:-1]])[None]
        passed = decoder.read(ids, jnp.arange(ids.shape[1])[None], 64)
        total += np.asarray(expert_load(passed.stats))
    np.testing.assert_array_equal(session.expert_load, total)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"), weights())


@pytest.fixture
def call(run, capsys):
    def call(*arguments):
        """Status, standard output and standard error."""
        common = ["--checkpoint", str(run), "--prompt-ids", "5,77", "--temperature", "0"]
        common += ["--max-new-tokens", "4", "--compilation-cache", ""]
        status = generate.main([*common, *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_a_measured_load_places_copies(call, tmp_path):
    mesh = ("--mesh.data", 2, "--mesh.expert", 4, "--mesh.expert-nodes", 2)
    file = tmp_path / "load.json"
    status, plain, said = call(*mesh, "--save-expert-load", file)
    assert status == 0, said
    assert f"wrote {file}: tokens per expert [2, 8]" in said
    assert [sum(row) for row in json.loads(file.read_text())] == [10, 10]
    again = tmp_path / "load.npy"
    status, copied, said = call(
        *mesh, "--redundant-experts", 4, "--expert-load", file, "--save-expert-load", again
    )
    assert status == 0, said
    assert copied == plain
    after, before = map(float, re.findall(r"([\d.]+) (?:times|without)", said))
    assert after <= before
    np.testing.assert_array_equal(np.load(again), json.loads(file.read_text()))


@pytest.mark.slow
def test_copies_lie_on_the_devices_of_several_processes(call, run, tmp_path):
    """Two nodes of two shards, a process each, give the text of one process without copies."""
    np.save(tmp_path / "load.npy", LOAD)
    status, plain, said = call("--mesh.data", 2, "--mesh.expert", 4)
    assert status == 0, said
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for i in range(2):
        command = [
            sys.executable, "generate.py", "--checkpoint", run, "--prompt-ids", "5,77",
            "--temperature", 0, "--max-new-tokens", 4, "--compilation-cache", "", "--emulate", 2,
            "--mesh.data", 1, "--mesh.expert", 4, "--mesh.expert-nodes", 2,
            "--redundant-experts", 4, "--expert-load", tmp_path / "load.npy",
            "--save-expert-load", tmp_path / "again.json",
            "--coordinator", f"localhost:{port}", "--num-processes", 2, "--process-id", i,
        ]  # fmt: skip
        words, pipe = [str(word) for word in command], subprocess.PIPE
        started.append(subprocess.Popen(words, cwd=HERE, stdout=pipe, stderr=pipe, text=True))
    ended = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert [out for out, _ in ended] == [plain, ""]
    counted = json.loads((tmp_path / "again.json").read_text())
    assert [sum(row) for row in counted] == [10, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--redundant-experts", 4], "--redundant-experts 4 needs --expert-load FILE"),
        (["--redundant-experts", -1], "--redundant-experts is -1; give 0 or more"),
        (["--expert-load", "load.npy"], "has no effect without copies; add --redundant-experts"),
        (["--save-expert-load", "load.txt"], "load.txt: the name must end in .npy or .json"),
        (["--save-expert-load", "nowhere/load.npy"], "nowhere; make it, or give another place"),
        (
            ["--redundant-experts", 4, "--expert-load", "nowhere.npy"],
            "--expert-load nowhere.npy: no such file; --save-expert-load writes one",
        ),
    ],
)
def test_options_that_contradict_each_other(call, arguments, message):
    status, _, said = call("--mesh.data", 2, "--mesh.expert", 4, *arguments)
    assert status == 2
    assert message in said


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        (LOAD, [3], "8 experts and 3 copies are 11, which do not split over 4 shards of experts; "
         "give 4"),
        (LOAD, [6], "do not split over 4 shards of experts; give 4 or 8"),
        (LOAD[:, :6], [4], "has shape [3, 6]; this model needs tokens per expert [2, 8], a row per "
         "MoE layer. Measure it on this model with --save-expert-load"),
        (LOAD[:1], [4], "has shape [1, 8]; this model needs tokens per expert [2, 8]"),
        (LOAD[0], [4], "has shape [8]; this model needs tokens per expert [2, 8]"),
        (LOAD[:2], [4, "--speculate", "on"], "needs tokens per expert [3, 8], a row per MoE layer, "
         "then the MTP module. Measure it on this model with --save-expert-load and --speculate"),
        (LOAD * [[1], [0], [1]], [4], "no tokens at all in layers [1] (of 3, from 0); measure"),
        (-LOAD, [4], "holds numbers that are no counts"),
        (np.array(["x"]), [4], "holds no table of numbers"),
    ],
)  # fmt: skip
def test_loads_that_do_not_fit(call, tmp_path, load, arguments, message):
    np.save(tmp_path / "load.npy", load)
    status, _, said = call(
        "--mesh.data", 2, "--mesh.expert", 4, "--expert-load", tmp_path / "load.npy",
        "--redundant-experts", *arguments,
    )  # fmt: skip
    assert status == 2
    assert message in said


def test_a_json_file_that_is_none(tmp_path):
    for text_of_file in ("[[1, 2], [3]]", "{", '{"a": 1}'):
        (tmp_path / "load.json").write_text(text_of_file)
        with pytest.raises(ValueError, match="holds no table of numbers"):
            experts.read_load(tmp_path / "load.json")


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="no layers of experts; leave out --redundant-experts"):
        experts.check_options(ExpertOptions(redundant_experts=8), has_experts=False)


def test_mtp_modules_beyond_the_first_have_its_load():
    deep = dataclasses.replace(CONFIG, mtp_depth=3)
    rows = experts.load_of_layers(LOAD, deep, 3, pathlib.Path("load.npy"))
    np.testing.assert_array_equal(rows, LOAD[[0, 1, 2, 2, 2]])
