"""Answers from a server that speaks OpenAI's completions API, in place of our own sampler.

Prompts go out as token ids. Servers that return the ids of what they drew (vLLM's
`return_token_ids`) and their log-probabilities give a rollout as good as ours; the trainer's own
log-probabilities are then compared with the server's as with our sampler's. Answers that come as
text alone are encoded again, which may give other tokens than were drawn: their log-probabilities
are left out (NaN), so nothing is corrected by them.

The server's weights are its own. With `reload`, every publication writes a Hugging Face folder and
asks the server to load it (SGLang's `/update_weights_from_disk`); without it the server's policy
grows old, which `policy/sampler_gap` shows.
"""

import dataclasses
import functools
import http.client
import json
import queue
import shutil
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from rl.rollout import Rollout
from rl.stopping import POLL_S, RolloutStoppedError, Stop, never

RETRY_STATUS = {408, 429, 500, 502, 503, 504}


class ServerError(ValueError):
    """A server that cannot be used: which, what it said, and what to do."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where answers come from."""

    url: str
    """Without /v1, such as http://localhost:8000."""
    model: str
    """Name that the server knows the model by."""
    timeout: float = 600.0
    """Seconds for one request."""
    retries: int = 4
    """Further tries of a request that failed for a passing reason."""
    wait: float = 0.5
    """Seconds before the first of these; each waits twice as long as the one before."""
    parallel: int = 32
    """Requests at a time."""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(
                f"rl.server is {self.url!r}; give a URL such as http://localhost:8000, without /v1"
            )

    def post(self, path: str, body: dict[str, Any], stop: Stop = never) -> Any:
        """The answer's JSON. ServerError once the tries are used up, or for a request refused;
        RolloutStoppedError, between two tries only, if `stop()` says true."""
        wrong = ""
        for attempt in range(self.retries + 1):
            if attempt:
                _sleep(self.wait * 2 ** (attempt - 1), stop)
            try:
                status, content = self._post_once(path, json.dumps(body).encode())
            except (OSError, http.client.HTTPException) as error:
                wrong = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self._read(path, content)
            wrong = f"status {status}: {content[:300].decode('utf-8', 'replace')}"
            if status not in RETRY_STATUS:
                raise ServerError(f"{self.url}{path} refused the request, {wrong}")
        raise ServerError(
            f"{self.url}{path} gave no answer in {self.retries + 1} tries, the last: {wrong}. Is "
            "the server up, and rl.server its address?"
        )

    def _post_once(self, path: str, body: bytes) -> tuple[int, bytes]:
        parts = urllib.parse.urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", parts.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _read(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(
                f"{self.url}{path} answered what is no JSON: {content[:100]!r}; is this a server "
                "of OpenAI's API?"
            ) from None


class ServerSampler:
    """The `Sampler` of stage rl for a server.

    Args:
      server, tokenizer: the server's model has this tokenizer.
      temperature: of the draws; 0 is greedy.
      max_new_tokens: longest answer, its end token included.
      write: writes the weights of `publish` as a Hugging Face folder; None never loads any.
      folder: where that is, as both sides see it.
    """

    def __init__(
        self, server: Server, tokenizer: Tokenizer, temperature: float, max_new_tokens: int,
        write: Callable[[Any, Any, Path], None] | None = None, folder: Path | None = None,
    ):  # fmt: skip
        self._server, self._tokenizer = server, tokenizer
        self._temperature, self._budget = temperature, max_new_tokens
        self._write, self._folder = write, folder

    def publish(self, params: Any, router_bias: Any, stop: Stop = never) -> None:
        """Let the server take these weights, if it is to take any.

        Raises ServerError, and RolloutStoppedError soon after `stop()` says true.
        """
        if self._write is None or self._folder is None:
            return
        beside = self._folder.with_name(self._folder.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        self._write(params, router_bias, beside)
        shutil.rmtree(self._folder, ignore_errors=True)
        beside.rename(self._folder)
        body = {"model_path": str(self._folder.resolve())}
        (said,) = _all_of(
            [lambda given_up: self._server.post("/update_weights_from_disk", body, given_up)],
            1, stop,
        )  # fmt: skip
        if isinstance(said, dict) and said.get("success") is False:
            raise ServerError(f"{self._server.url} did not load {self._folder}: {said}")

    def borrow(self, other: Any) -> None:
        """Nothing to take: the weights are at the server."""

    def __call__(
        self, prompts: Sequence[np.ndarray], group_size: int, seed: int,
        stop: Stop = never,
    ) -> Rollout:  # fmt: skip
        """Answer every prompt `group_size` times, `Server.parallel` prompts at a time.

        Raises ServerError, and RolloutStoppedError soon after `stop()` says true.
        """
        began = time.perf_counter()
        asked = [
            functools.partial(self._ask, prompt, group_size, (seed + i) & 0x7FFFFFFF)
            for i, prompt in enumerate(prompts)
        ]
        found = _all_of(asked, self._server.parallel, stop)
        answers = [answer for of_prompt in found for answer in of_prompt]
        tokens = [ids for ids, _, _ in answers]
        return Rollout(
            tokens=tokens,
            logps=[logps for _, logps, _ in answers],
            truncated=np.array([cut for _, _, cut in answers], bool),
            routes=None,
            seconds=time.perf_counter() - began,
            passes=sum(map(len, tokens)),
        )

    def _ask(self, prompt: np.ndarray, count: int, seed: int, stop: Stop):
        """(ids, log-probabilities, truncated) of each answer to one prompt."""
        body = {
            "model": self._server.model, "prompt": prompt.tolist(), "n": count, "seed": seed,
            "temperature": self._temperature, "top_p": 1.0, "max_tokens": self._budget,
            "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        said = self._server.post("/v1/completions", body, stop)
        try:
            choices = sorted(said["choices"], key=lambda choice: choice.get("index", 0))
            found = [self._answer(choice) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self._server.url}/v1/completions answered without what is needed "
                f"({type(error).__name__}: {error}): {str(said)[:300]}"
            ) from None
        if len(found) != count:
            raise ServerError(
                f"{self._server.url}/v1/completions gave {len(found)} answers where n={count} were "
                "asked for"
            )
        return found

    def _answer(self, choice: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, bool]:
        cut = choice["finish_reason"] == "length"
        ids = choice.get("token_ids")
        if ids is None:
            encoded = self._tokenizer.encode(choice["text"])[: self._budget]
            end = [] if cut or len(encoded) == self._budget else [self._tokenizer.eos_id]
            tokens = np.concatenate([encoded, np.array(end, np.int32)]).astype(np.int32)
            return tokens, np.full(len(tokens), np.nan, np.float32), not end
        tokens = np.array(ids, np.int32)
        if not cut and (not len(tokens) or tokens[-1] != self._tokenizer.eos_id):
            raise ValueError(f"token_ids end with {ids[-1:]}, not with the end token")
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        if logps is None or len(logps) != len(tokens):
            return tokens, np.full(len(tokens), np.nan, np.float32), cut
        return tokens, np.array(logps, np.float32), cut


def _sleep(seconds: float, stop: Stop) -> None:
    end = time.monotonic() + seconds
    while True:
        if stop():
            raise RolloutStoppedError
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, POLL_S))


def _all_of(calls: Sequence[Callable[[Stop], Any]], parallel: int, stop: Stop) -> list[Any]:
    """What the calls return, `parallel` at a time; each is given the `Stop` of all of them.

    The first error ends the wait, and so does `stop()`, with RolloutStoppedError. Calls that are
    then under way go on in daemon threads, which do not keep the process from ending.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    ended: queue.SimpleQueue = queue.SimpleQueue()
    given_up = threading.Event()
    for one in enumerate(calls):
        waiting.put(one)

    def work() -> None:
        while not given_up.is_set():
            try:
                number, call = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                ended.put((number, call(given_up.is_set), None))
            except BaseException as error:
                ended.put((number, None, error))

    for _ in range(min(parallel, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    found: dict[int, Any] = {}
    try:
        while len(found) < len(calls):
            if stop():
                raise RolloutStoppedError
            try:
                number, value, error = ended.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            found[number] = value
    finally:
        given_up.set()
    return [found[number] for number in range(len(calls))]
