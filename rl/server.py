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

import contextlib
import dataclasses
import functools
import http.client
import json
import multiprocessing
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint.hf_reader import own_files
from checkpoint.hf_writer import export
from data.tokenizer import Tokenizer
from model.blueprint import Tree
from model.config import ModelConfig
from rl.rollout import Rollout
from rl.stopping import POLL_S, RolloutStoppedError, Stop, never

SERVED = "served"
"""Folder of a run that a server loads."""
RETRY_STATUS = {408, 429, 500, 502, 503, 504}


class ServerError(ValueError):
    """A server that cannot be used: which, what it said, and what to do."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A server of OpenAI's completions API."""

    url: str
    """Address without /v1, such as http://localhost:8000."""
    model: str
    """Name that the server knows the model by."""
    timeout: float = 600.0
    """Seconds that a request may take."""
    retries: int = 4
    """Further tries of a request that failed for a passing reason."""
    wait: float = 0.5
    """Seconds before the first further try; each try waits twice as long as the one before."""
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
        request = urllib.request.Request(
            self.url.rstrip("/") + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        wrong = ""
        for attempt in range(self.retries + 1):
            if attempt:
                _sleep(self.wait * 2 ** (attempt - 1), stop)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return self._read(path, answer.read())
            except urllib.error.HTTPError as error:
                wrong = f"status {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code not in RETRY_STATUS:
                    raise ServerError(f"{self.url}{path} refused the request, {wrong}") from None
            except (OSError, http.client.HTTPException) as error:
                wrong = f"{type(error).__name__}: {error}"
        raise ServerError(
            f"{self.url}{path} gave no answer in {self.retries + 1} tries, the last: {wrong}. Is "
            "the server up, and rl.server its address?"
        )

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
      write: writes the weights of `publish` as a Hugging Face folder; None: no weights are loaded.
      folder: place of that folder, as both sides see it.
    """

    def __init__(
        self,
        server: Server,
        tokenizer: Tokenizer,
        temperature: float,
        max_new_tokens: int,
        write: Callable[[Any, Any, Path], None] | None = None,
        folder: Path | None = None,
    ):
        self._server, self._tokenizer = server, tokenizer
        self._temperature, self._budget = temperature, max_new_tokens
        self._write, self._folder = write, folder

    def publish(self, params: Any, router_bias: Any, stop: Stop = never) -> None:
        """Have the server load these weights, if it is to load any.

        Raises ServerError, and RolloutStoppedError soon after `stop()` says true.
        """
        if self._write is None or self._folder is None:
            return
        new = self._folder.with_name(self._folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        self._write(params, router_bias, new)
        shutil.rmtree(self._folder, ignore_errors=True)
        new.rename(self._folder)
        body = {"model_path": str(self._folder.resolve())}
        load = functools.partial(self._server.post, "/update_weights_from_disk", body)
        (said,) = _all_of([load], 1, stop)
        if isinstance(said, dict) and said.get("success") is False:
            raise ServerError(f"{self._server.url} did not load {self._folder}: {said}")

    def borrow(self, other: Any) -> None:
        """Nothing to take: the weights are at the server."""

    def __call__(
        self, prompts: Sequence[np.ndarray], group_size: int, seed: int, stop: Stop = never
    ) -> Rollout:
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
            "model": self._server.model,
            "prompt": prompt.tolist(),
            "n": count,
            "seed": seed,
            "temperature": self._temperature,
            "top_p": 1.0,
            "max_tokens": self._budget,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        tried, broken = self._server.retries + 1, ""
        for attempt in range(tried):
            if attempt:
                _sleep(self._server.wait * 2 ** (attempt - 1), stop)
            found, broken = self._read(self._server.post("/v1/completions", body, stop))
            if not broken:
                break
        else:
            raise ServerError(
                f"{self._server.url}/v1/completions broke answers off in {tried} tries, with "
                f"finish_reason {broken}; an answer ends with 'stop' or 'length'. See the server's "
                "own messages"
            )
        if len(found) != count:
            raise ServerError(
                f"{self._server.url}/v1/completions gave {len(found)} answers where n={count} were "
                "asked for"
            )
        return found

    def _read(self, said: Any):
        """Answers of a reply, and the reasons of those that the server broke off, in words."""
        try:
            choices = sorted(said["choices"], key=lambda choice: choice.get("index", 0))
            reasons = {choice["finish_reason"] for choice in choices} - {"stop", "length"}
            if reasons:
                return [], ", ".join(map(repr, reasons))
            return [self._answer(choice) for choice in choices], ""
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self._server.url}/v1/completions answered without what is needed "
                f"({type(error).__name__}: {error}): {str(said)[:300]}"
            ) from None

    def _answer(self, choice: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, bool]:
        """(ids, log-probabilities, truncated); ValueError for an answer that is not whole, and for
        ids that are no tokens."""
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"finish_reason is {choice['finish_reason']!r}, not stop or length")
        cut, known = choice["finish_reason"] == "length", self._tokenizer
        ids = choice.get("token_ids")
        if ids is None:
            # Marks are in the text by their names, as skip_special_tokens false asks for.
            tokens = known.encode(choice["text"], special=True)[: self._budget]
            ended = bool(len(tokens)) and int(tokens[-1]) in known.end_ids
            if not (cut or ended or len(tokens) == self._budget):
                tokens, ended = np.append(tokens, np.int32(known.end_id)), True
        else:
            tokens, ended = self._checked(ids), not cut
            if ended and (not len(tokens) or int(tokens[-1]) not in known.end_ids):
                raise ValueError(f"token_ids end with {ids[-1:]}, not with an end token")
        if not len(tokens) or np.isin(tokens[:-1], known.end_ids).any():
            raise ValueError("the answer is empty, or goes on after its end token")
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or logps is None or len(logps) != len(tokens):
            return tokens, np.full(len(tokens), np.nan, np.float32), not ended
        return tokens, np.array(logps, np.float32), not ended

    def _checked(self, ids: list[Any]) -> np.ndarray:
        """Ids of an answer, int32 [n]; ValueError unless each is a token, and they fit."""
        size = self._tokenizer.vocab_size
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]
        wrong += [i for i in ids if i not in wrong and not 0 <= i < size]
        if wrong:
            raise ValueError(f"token_ids hold {wrong[0]!r}; the tokenizer has ids 0..{size - 1}")
        if len(ids) > self._budget:
            raise ValueError(f"{len(ids)} token_ids where max_tokens is {self._budget}")
        return np.array(ids, np.int32)


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
    """Results of the calls, `parallel` at a time; each call is given the `Stop` of all of them.

    The first error ends the wait, and so does `stop()`, with RolloutStoppedError. Calls that are
    then under way go on in the pool's daemon threads, which do not keep the process from ending.
    """
    given_up = threading.Event()
    found: dict[int, Any] = {}
    with ThreadPool(min(parallel, len(calls))) as pool:
        try:
            ended = pool.imap_unordered(lambda i: (i, calls[i](given_up.is_set)), range(len(calls)))
            while len(found) < len(calls):
                if stop():
                    raise RolloutStoppedError
                with contextlib.suppress(multiprocessing.TimeoutError):
                    number, result = ended.next(POLL_S)
                    found[number] = result
        finally:
            given_up.set()
    return [found[i] for i in range(len(calls))]


# ---- Weights for the server ----------------------------------------------------------------------


class LiveWeights:
    """Arrays on devices of this process, read as `checkpoint/weights.py:Weights` are."""

    def __init__(self, config: ModelConfig, run_dir: Path, params: Tree, router_bias: Tree):
        self.path, self.config = run_dir, config
        state = {"params": params, "router_bias": router_bias}
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        self._arrays = {
            jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
        }

    @property
    def carried(self) -> list[Path]:
        """What the run keeps of its tokenizer."""
        return own_files(self.path)

    def scale_inv(self, name: str) -> np.ndarray | None:
        """None: these weights were not released in FP8."""
        del name

    def read(self, tree: str, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """As `Weights.read`."""
        return np.asarray(jax.device_get(self._arrays[f"{tree}/{path}"][index])).astype(dtype)

    def load(self, abstract: Any, progress: Any = None) -> Any:
        """Always a ValueError: these weights are loaded already."""
        raise ValueError("these weights are in memory already; read them")


def export_live(
    config: ModelConfig, run_dir: Path, params: Tree, router_bias: Tree, folder: Path
) -> None:
    """Write a run's weights to `folder`, in bf16, straight from memory, as `convert.py export`."""
    export(LiveWeights(config, run_dir, params, router_bias), folder, say=lambda line: None)
