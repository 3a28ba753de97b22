"""How answers begin and end: special tokens, end tokens, room, and logits that are no numbers."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

import convert
import generate
from checkpoint.weights import open_weights
from configs.schema import RunConfig
from data.conventions import BOS, EOS
from data.tokenizer import train_tokenizer
from generation import engine
from generation.config import Sampling
from generation.engine import Generator
from model.recipe import Recipe
from rl.examples.conversations import encode_pair
from rl.problems import Problem
from rl.prompts import encode_prompt
from rl.rollout import PolicySampler
from rl.stage_rl import policy_tokenizer
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout
from tests.small_model import CONFIG, hf_folder, run_folder, tensors, weights
from training.config import Phase, TrainConfig
from training.evaluate import evaluate
from training.run import write_settings

SMALL = dataclasses.replace(CONFIG, hidden_size=128, num_layers=2, mtp_depth=0, max_position=32)
TOKENIZER = train_tokenizer(["the cat sat on the mat, the rat ran"] * 3, CONFIG.vocab_size)
USER = "<｜User｜>"


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Calls share their programs, and leave nothing in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Generator", functools.cache(engine.Generator))
        for kind in (generate.Common, generate.Generate, generate.Score):
            patch.setattr(kind, "compilation_cache", "")
        yield


def rigged(path, *chain, config=SMALL, **files):
    """A Hugging Face folder whose greedy text follows the chain of token ids."""
    V, D = config.vocab_size, config.hidden_size
    embed = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    head = np.zeros((V, D), np.float32)
    for token, following in itertools.pairwise(chain):
        head[following] += 50 * embed[token]
    state = tensors(weights(config), config)
    silent = ("o_proj.weight", "down_proj.weight")
    state = {name: x * (not name.endswith(silent)) for name, x in state.items()}
    state |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    state["model.norm.weight"] = np.ones(D, np.float32)
    folder = hf_folder(path, [state], config)
    (folder / "tokenizer.json").write_text(TOKENIZER.json)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def letters(text):
    return TOKENIZER.encode(text).tolist()


def call(capsys, folder, *arguments):
    """(status, standard output, standard error) of greedy text."""
    greedy = ["--temperature", "0", "--mesh.data", "8"]
    status = generate.main(["--checkpoint", str(folder), *greedy, *arguments])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """After bos it says z, the mark of a user, y, and an end token of its own; then x, eos."""
    (z,), (y,), (q,), (x,) = map(letters, "zyqx")
    user = TOKENIZER.token_id(USER)
    chain = TOKENIZER.bos_id, z, user, y, q, x, TOKENIZER.eos_id
    path = tmp_path_factory.mktemp("hf")
    return rigged(path, *chain, generation_config={"eos_token_id": [TOKENIZER.eos_id, q]})


def test_the_name_of_a_special_token_stops(spoken, capsys):
    assert call(capsys, spoken, "--prompt", "")[:2] == (0, "zy\n")  # ends of generation_config.json
    assert call(capsys, spoken, "--prompt", "", "--stop", USER)[:2] == (0, "z\n")
    assert call(capsys, spoken, "--prompt", "", "--stop", "y", "--stop", USER)[1] == "z\n"
    status, _, said = call(capsys, spoken, "--prompt", "", "--stop", f"z{USER}")
    assert status == 2
    assert f"holds the special token {USER}" in said


def test_names_of_marks_in_a_prompt_are_told_and_read_on_demand(spoken, capsys):
    _, _, said = call(capsys, spoken, "--prompt", f"{USER}z", "--max-new-tokens", "1")
    assert f"warning: {USER} in prompts are read as letters; --special" in said
    _, out, said = call(capsys, spoken, "--prompt", f"z{USER}", "--special")
    assert (out, "warning" in said) == ("y\n", False)
    assert call(capsys, spoken, "--prompt", "a", "--special", "--chat")[0] == 2


def test_the_default_length_is_the_room_that_is_left(spoken, tmp_path, capsys):
    """A number that was given and does not fit is an error all the same."""
    z = letters("z")[0]
    endless = rigged(tmp_path / "hf", TOKENIZER.bos_id, z, z)
    status, out, said = call(capsys, endless, "--prompt", "")
    assert (status, out) == (0, "z" * (SMALL.max_position - 1) + "\n")
    assert "at most 31 new tokens: the model's max_position is 32" in said
    assert call(capsys, endless, "--prompt", "", "--max-new-tokens", "32")[0] == 2
    status, _, said = call(capsys, endless, "--prompt", "z" * 40)
    assert (status, "max_position is 32" in said) == (2, True)


# ---- One beginning -------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [None, False])
def test_a_prompt_begins_alike_wherever_it_is_asked_and_in_what_is_made_of_a_folder(
    tmp_path, begins
):
    """Names of a release's tokens are kept as well."""
    text = TOKENIZER.json.replace(BOS, "[BOS]").replace(EOS, "[EOS]")
    settings = {"bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}}
    settings |= {} if begins is None else {"add_bos_token": begins}
    ends = {"eos_token_id": [5, 1]}
    folder = rigged(tmp_path / "hf", 0, 5, tokenizer_config=settings, generation_config=ends)
    (folder / "tokenizer.json").write_text(text)
    wanted = ([0] if begins is None else []) + letters("cat")
    run = run_folder(tmp_path / "run", weights(SMALL), SMALL)
    made = _run(run)
    write_settings(made, policy_tokenizer(made, str(folder)).files)
    assert convert.main(["import", str(folder), str(tmp_path / "import")]) == 0
    assert convert.main(["export", str(run), str(tmp_path / "export")]) == 0
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (0, 1)
    for place in (folder, run, tmp_path / "import", tmp_path / "export"):
        new = _run(tmp_path / "new")
        tokenizer = policy_tokenizer(new, str(place))
        assert tokenizer.end_ids == (5, 1)
        assert encode_prompt(tokenizer, Problem("cat", {})).tolist() == wanted
        pair = encode_pair(tokenizer, "cat", "z").ids.tolist()
        assert pair == [*wanted, *letters("z"), 1]
        source = generate_source(place)
        options = generate.Generate(checkpoint=place, prompt=("cat",))
        (ids,) = generate.encode_prompts(options, *source)
        assert ids.tolist() == wanted
        assert generate.end_ids(*source) == (5, 1)


def generate_source(place):
    source = open_weights(place)
    return source, generate.load_tokenizer(source)


def _run(folder):
    train = TrainConfig(steps=1, seq_len=8, batch_size=1, learning_rate=(Phase(0, 1e-3),))
    return RunConfig(model=SMALL, train=train, run_dir=str(folder))


def test_a_run_keeps_its_tokenizer(tmp_path):
    run = _run(run_folder(tmp_path / "run", weights(SMALL), SMALL))
    write_settings(run, TOKENIZER.of_documents().files)
    assert policy_tokenizer(run, "").sha256 == TOKENIZER.sha256
    other = tmp_path / "other.json"
    other.write_text(train_tokenizer(["other words"], 300).json)
    named = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=str(other)))
    with pytest.raises(ValueError, match=r"is another tokenizer than .*tokenizer\.json"):
        policy_tokenizer(named, "")


# ---- Logits that are not numbers -----------------------------------------------------------------


def damaged(trees, name="final_norm", value=np.nan):
    """A copy of the weights with one norm broken."""
    trees = jax.tree.map(np.copy, trees)
    trees["params"][name]["scale"][...] = value
    return trees


def test_generate_and_score_refuse_logits_that_are_no_numbers(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", damaged(weights(SMALL)), SMALL)
    for temperature in ("0", "0.7"):
        command = ["--prompt-ids", "5,6", "--temperature", temperature, "--max-new-tokens", "4"]
        assert generate.main(["--checkpoint", str(folder), "--mesh.data", "8", *command]) == 2
        out, said = capsys.readouterr()
        assert out == ""
        assert "logits are not finite numbers" in said
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), np.int32))
    score = ["score", "--checkpoint", str(folder), "--tokens", str(tmp_path / "tokens.npy")]
    score += ["--mesh.data", "8"]
    for out in ([], ["--out", str(tmp_path / "logits.npy")]):
        assert generate.main([*score, *out]) == 2
        assert "logits of the model are not all finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("logits*"))


LAYOUT = MeshConfig()


@pytest.mark.parametrize(
    ("sampling", "value"), [(Sampling(0), np.nan), (Sampling(1.0, 5, 0.9), np.inf)]
)
def test_a_policy_whose_logits_are_no_numbers_answers_nothing(sampling, value):
    layout = Layout(make_mesh(LAYOUT, jax.devices()[:1]))
    sampler = PolicySampler(
        SMALL, Recipe(), layout, sampling, rows=2, max_new_tokens=3, eos_ids=(1,)
    )
    good = jax.tree.map(jax.numpy.asarray, weights(SMALL))
    sampler.publish(good["params"], good["router_bias"])
    assert min(sampler([np.array([5, 6], np.int32)], 2, 0).tokens[0]) >= 0
    bad = jax.tree.map(jax.numpy.asarray, damaged(weights(SMALL), value=value))
    sampler.publish(bad["params"], bad["router_bias"])
    with pytest.raises(FloatingPointError, match="not finite numbers"):
        sampler([np.array([5, 6], np.int32)], 2, 0)


@pytest.mark.slow
def test_drafts_from_logits_that_are_no_numbers_are_an_error():
    layout = Layout(make_mesh(LAYOUT, jax.devices()[:1]))
    generator = Generator(CONFIG, Recipe(), layout)
    trees = jax.tree.map(np.copy, weights(CONFIG))
    trees["params"]["mtp"]["out_norm"]["scale"][...] = np.nan
    ready = generator.prepare(jax.tree.map(jax.numpy.asarray, trees))
    prompts = [np.array([5, 6], np.int32)]
    assert not generator.start(ready, prompts, Sampling(0), 4).done  # the main model is sound
    session = generator.start(ready, prompts, Sampling(0), 4, speculate=True)
    session.advance()
    with pytest.raises(FloatingPointError, match="not finite numbers"):
        session.advance()


def test_a_held_out_loss_that_is_no_number_is_an_error(monkeypatch):
    class Reader:
        eval_bytes = 10

        def __iter__(self):
            yield {}

    class Trainer:
        layout = None

        def evaluate(self, *_):
            return {"nats": np.float32(np.nan), "targets": np.float32(3)}

    monkeypatch.setattr("training.evaluate.place_rows", lambda *a: {})
    state = {"params": {}, "router_bias": {}, "step": np.int32(7)}
    with pytest.raises(FloatingPointError, match="held-out loss is nan at step 7"):
        evaluate(Trainer(), state, Reader(), range(1), 1, print)  # pyright: ignore
