"""Rollouts from a server of OpenAI's completions API: a real one, on this machine's loopback."""

import dataclasses
import http.server
import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from checkpoint.weights import open_weights
from data.tokenizer import train_tokenizer
from rl.config import RLConfig
from rl.corpus import configured_task
from rl.server import Server, ServerError, ServerSampler, export_live
from rl.stopping import RolloutStoppedError
from rl.tasks.characters import character_tokenizer
from tests.small_model import CONFIG, weights
from tests.test_rl_loop import make_loop, make_trainer, same, tiny_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = train_tokenizer(["a few words to learn tokens from"] * 3, 300)
EOS = TOKENIZER.eos_id
PROMPTS = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what `server.reply(path, body)` says: (status, JSON or bytes)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, said = self.server.reply(self.path, body)  # pyright: ignore
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """`sampler = serve(reply, **options)`, with a server behind it."""
    servers = []

    def start(reply, temperature=1.0, budget=6, write=None, folder=None, **options):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.reply = reply  # pyright: ignore
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}"
        options = {"wait": 0.01, "timeout": 5.0} | options
        return ServerSampler(
            Server(url, "policy", **options), TOKENIZER, temperature, budget, write, folder
        )

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def choice(ids, logps=None, cut=False, index=0):
    return {
        "index": index, "text": "", "finish_reason": "length" if cut else "stop",
        "token_ids": ids, "logprobs": logps and {"token_logprobs": logps},
    }  # fmt: skip


def test_tokens_and_their_log_probabilities(serve):
    asked = []

    def reply(path, body):
        asked.append((path, body))
        last = body["prompt"][-1]
        return 200, {"choices": [
            choice([last, 3], [-1.0, -2.0], cut=True, index=1),
            choice([last, EOS], [-0.25, -0.5], index=0),
        ]}  # fmt: skip

    rollout = serve(reply, temperature=0.7)(PROMPTS, 2, 11)
    assert [t.tolist() for t in rollout.tokens] == [[7, EOS], [7, 3], [8, EOS], [8, 3]]
    assert [x.tolist() for x in rollout.logps] == [[-0.25, -0.5], [-1, -2]] * 2
    assert rollout.truncated.tolist() == [False, True] * 2
    assert rollout.num_tokens == 8
    bodies = {tuple(body["prompt"]): body for _, body in asked}
    assert {path for path, _ in asked} == {"/v1/completions"}
    first = bodies[5, 6, 7]
    assert (first["n"], first["temperature"], first["max_tokens"]) == (2, 0.7, 6)
    assert first["seed"] != bodies[(8,)]["seed"]


def test_text_alone_is_encoded_again_without_log_probabilities(serve):
    text = {"text": "few words", "finish_reason": "stop", "logprobs": {"token_logprobs": [-1]}}
    rollout = serve(lambda path, body: (200, {"choices": [text]}), budget=40)(PROMPTS, 1, 0)
    assert rollout.tokens[0].tolist() == [*TOKENIZER.encode("few words"), EOS]
    assert np.isnan(rollout.logps[0]).all()
    cut = serve(lambda path, body: (200, {"choices": [text]}), budget=2)(PROMPTS, 1, 0)
    assert cut.tokens[0].tolist() == TOKENIZER.encode("few words")[:2].tolist()
    assert cut.truncated.all()


def test_marks_in_a_text_are_tokens_and_an_end_is_added_where_it_stopped(serve):
    def answered(text, reason, budget=40):
        choices = [{"text": text, "finish_reason": reason}]
        rollout = serve(lambda path, body: (200, {"choices": choices}), budget=budget)(
            PROMPTS[:1], 1, 0
        )
        return rollout.tokens[0].tolist(), bool(rollout.truncated[0])

    a, b = TOKENIZER.encode("a").tolist(), TOKENIZER.encode("b").tolist()
    think, end = TOKENIZER.token_id("<think>"), TOKENIZER.token_id("</think>")
    assert answered("<think>a</think>b", "stop") == ([think, *a, end, *b, EOS], False)
    assert answered("a<｜end▁of▁sentence｜>", "stop") == ([*a, EOS], False)
    assert answered("a", "length") == (a, True)
    with pytest.raises(ServerError, match="goes on after its end"):
        answered("a<｜end▁of▁sentence｜>b", "stop")


@pytest.mark.parametrize("reason", ["abort", "content_filter", "error", "tool_calls", None])
def test_an_answer_that_was_broken_off_is_asked_again(serve, reason):
    tries = []

    def reply(path, body):
        tries.append(0)
        broken = {"text": "the answer is 4, or rath", "finish_reason": reason}
        good = choice([3, EOS]) if len(tries) > 2 else broken
        return 200, {"choices": [choice([4, EOS]), good]}

    assert serve(reply)(PROMPTS[:1], 2, 0).tokens[1].tolist() == [3, EOS]
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(ServerError, match=f"broke answers off in 2 tries.* {reason!r}"):
        serve(reply, retries=1)(PROMPTS[:1], 2, 0)


def test_it_tries_again(serve):
    tries = []

    def reply(path, body):
        tries.append(0)
        return (503, {"error": "busy"}) if len(tries) < 3 else (200, {"choices": [choice([EOS])]})

    assert serve(reply)(PROMPTS[:1], 1, 0).tokens[0].tolist() == [EOS]
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda path, body: (500, {"error": "broken"}), "no answer in 2 tries.*500.*broken"),
        (lambda path, body: (404, {"error": "no model"}), "refused the request, status 404"),
        (lambda path, body: (200, b"<html>"), "no JSON: b'<html>'"),
        (lambda path, body: (200, {"choices": []}), "gave 0 answers where n=1"),
        (lambda path, body: (200, {"data": 3}), "without what is needed .KeyError: 'choices'"),
        (lambda path, body: (200, {"choices": [choice([3])]}), "not with an end token"),
        (lambda path, body: (200, {"choices": [choice([300, EOS])]}), "hold 300; .*0..299"),
        (lambda path, body: (200, {"choices": [choice([-1, EOS])]}), "hold -1"),
        (lambda path, body: (200, {"choices": [choice([3.5, EOS])]}), "hold 3.5"),
        (lambda path, body: (200, {"choices": [choice([True, EOS])]}), "hold True"),
        (lambda path, body: (200, {"choices": [choice([3] * 9, cut=True)]}), "max_tokens is 6"),
        (lambda path, body: (200, {"choices": [choice([EOS, 3, EOS])]}), "goes on after its end"),
        (lambda path, body: (200, {"choices": [choice([], cut=True)]}), "answer is empty"),
        (lambda path, body: time.sleep(3) or (200, {}), "no answer in 2 tries.*[Tt]ime"),
    ],
    ids=[
        "always 500",
        "404",
        "no JSON",
        "no answers",
        "another API",
        "no end",
        "no token",
        "below 0",
        "no integer",
        "a bool",
        "too long",
        "two ends",
        "empty",
        "hangs",
    ],
)
def test_what_goes_wrong_is_named(serve, reply, says):
    with pytest.raises(ServerError, match=says):
        serve(reply, retries=1, timeout=0.5)(PROMPTS[:1], 1, 0)


def test_nobody_there_and_no_address():
    sampler = ServerSampler(
        Server("http://127.0.0.1:9", "m", retries=1, wait=0.01), TOKENIZER, 1, 4
    )
    with pytest.raises(ServerError, match="Is the server up"):
        sampler(PROMPTS, 1, 0)
    for url in ("localhost:8000", "ftp://x", ""):
        with pytest.raises(ServerError, match="give a URL such as"):
            Server(url, "m")
    with pytest.raises(ValueError, match=r"needs rl\.server_model"):
        RLConfig(server="http://localhost:8000")


def test_a_stop_does_not_wait_for_the_server(serve):
    began = time.monotonic()
    with pytest.raises(RolloutStoppedError):
        serve(lambda path, body: time.sleep(4) or (200, {}), timeout=5)(
            PROMPTS, 1, 0, lambda: time.monotonic() > began + 0.3
        )
    assert time.monotonic() < began + 2


def test_a_stop_ends_the_tries(serve, tmp_path):
    """And their threads; publishing weights is given up in the same way."""
    before, began = threading.active_count(), time.monotonic()

    def stop():
        return time.monotonic() > began + 0.3

    busy = serve(lambda path, body: (503, {}), wait=60.0)
    with pytest.raises(RolloutStoppedError):
        busy(PROMPTS, 1, 0, stop)
    assert time.monotonic() < began + 2
    while threading.active_count() > before + 1:  # the server's
        time.sleep(0.1)
        assert time.monotonic() < began + 3
    hangs = serve(
        lambda path, body: time.sleep(4) or (200, {}),
        write=lambda params, router_bias, folder: folder.mkdir(), folder=tmp_path / "served",
    )  # fmt: skip
    began = time.monotonic()
    with pytest.raises(RolloutStoppedError):
        hangs.publish({}, {}, stop)
    assert time.monotonic() < began + 2


HANGING = """
import socket, time
import numpy as np
from rl.server import Server, ServerSampler
from rl.stopping import RolloutStoppedError
listening = socket.create_server(("127.0.0.1", 0))  # takes connections and says nothing
server = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", "m")
began = time.monotonic()
try:
    ServerSampler(server, None, 1.0, 4)(
        [np.array([1])] * 3, 1, 0, lambda: time.monotonic() > began + 0.5
    )
except RolloutStoppedError:
    print("stopped", flush=True)
"""


def test_a_process_ends_soon_after_its_rollout_was_stopped():
    """With requests under way that may take ten minutes each."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "stopped\n"
            assert process.wait(5) == 0
        finally:
            process.kill()


def test_weights_reach_the_server_as_a_folder(serve, tmp_path):
    """What it is told to load holds the weights, in bf16; a refusal is an error."""
    loaded, answer = [], {"success": True}

    def reply(path, body):
        loaded.append((path, open_weights(pathlib.Path(body["model_path"]))))
        return 200, answer

    def write(params, router_bias, folder):
        export_live(CONFIG, tmp_path, params, router_bias, folder)

    sampler = serve(reply, write=write, folder=tmp_path / "served")
    trees = weights()
    for _ in range(2):  # the second takes the first one's place
        sampler.publish(trees["params"], trees["router_bias"])
    path, found = loaded[-1]
    assert path == "/update_weights_from_disk"
    name = next(iter(jax.tree_util.tree_flatten_with_path(trees["params"])[0]))
    key = jax.tree_util.keystr(name[0], simple=True, separator="/")
    got = found.read("params", key, (slice(None),), np.float32)
    np.testing.assert_allclose(got, name[1], rtol=1e-2, atol=1e-3)
    answer["success"] = False
    with pytest.raises(ServerError, match="did not load"):
        sampler.publish(trees["params"], trees["router_bias"])


@pytest.mark.slow
def test_a_run_over_a_server_is_the_run_of_our_own_sampler(serve, tmp_path):
    """Same answers and log-probabilities in, same weights out, bit for bit.

    The model knows no ids but the tokenizer's: a server's others are refused.
    """

    def run_in(name):
        run = tiny_run(tmp_path / name, replay_routing=False)
        ids = character_tokenizer(configured_task(run.task).vocabulary).vocab_size
        return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=ids))

    run = run_in("own")
    own = make_loop(run, make_trainer(run))
    written = {}
    inner = own.sampler

    class Recorder:
        publish, borrow = inner.publish, inner.borrow

        def __call__(self, prompts, group_size, seed, stop=lambda: False):
            rollout = inner(prompts, group_size, seed, stop)
            for i, prompt in enumerate(prompts):
                answers = slice(i * group_size, (i + 1) * group_size)
                parts = zip(
                    rollout.tokens[answers], rollout.logps[answers], rollout.truncated[answers],
                    strict=True,
                )  # fmt: skip
                written[tuple(prompt.tolist()), (seed + i) & 0x7FFFFFFF] = [
                    choice(t.tolist(), x.tolist(), bool(cut), j)
                    for j, (t, x, cut) in enumerate(parts)
                ]
            return rollout

    own.sampler = Recorder()
    own.run()

    def reply(path, body):
        return 200, {"choices": written[tuple(body["prompt"]), body["seed"]]}

    other = run_in("server")
    theirs = make_loop(other, make_trainer(other))
    theirs.sampler = serve(reply)
    theirs.sampler._tokenizer = theirs.prompts.tokenizer
    theirs.run()
    assert same(own.state["params"], theirs.state["params"])
