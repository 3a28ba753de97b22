"""Every option of the objective, named after the paper that it comes from; none needs another file.

What is optimised is decided here; how answers are drawn, how often weights move and which prompts
are asked belongs to the run.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable
from typing import Literal

K1_REASON = (
    "kl_estimator is 'k1', log(policy / reference): as a term of the loss its expected gradient is "
    "zero, whatever the policy (it is a score function), so kl_coef would add noise and hold "
    "nothing. Give 'k3' (DeepSeekMath, R1), 'v3_2' (unbiased) or 'k2'"
)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """The policy objective of one update: advantages, ratio and clip, averages, KL, corrections."""

    group_size: int = 16
    """Answers per prompt, G (R1: 16)."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "gdpo"] = "grpo"
    """grpo: (r - mean) / std in the group. dr_grpo: r - mean (V3.2 too). rloo: r - mean of the
    others. gdpo: grpo for each reward by itself, weighted sum, divided by the batch's std."""
    advantage_eps: float = 1e-4
    """Added to every std; rewards of a group that differ by less than this hardly count."""
    dynamic_sampling: bool = False
    """Leave groups whose answers all got the same reward out of the loss (DAPO, eq. 11)."""
    overlong_filter: bool = False
    """Leave answers that were cut at the length limit out of the loss (DAPO, section 3.4)."""
    ratio: Literal["grpo", "gspo", "gspo_token", "cispo"] = "grpo"
    """policy / old policy. grpo: per token. gspo: per answer, length-normalised. gspo_token: its
    form for per-token advantages. cispo: a clipped constant times log policy (MiniMax-M1)."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped; 1 or more never clips (R1's 10)."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high are clipped (R1: 10, DAPO: 0.28, GSPO: 4e-4)."""
    dual_clip: float = 0.0
    """Bound, above 1, on the ratio of negative advantages (Ye et al. 2020); 0: no bound."""
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """dapo: mean over the batch's tokens. grpo: mean over each answer's tokens, then over answers
    (DeepSeekMath, R1). dr_grpo: sum over tokens / dr_grpo_length, mean over answers."""
    dr_grpo_length: int = 0
    """Tokens that dr_grpo divides every answer's sum by: the length limit of an answer."""
    kl_coef: float = 0.0
    """Weight of the KL term in the loss, beta (R1: 0.001, DeepSeekMath: 0.04); 0: no term."""
    kl_estimator: Literal["k2", "k3", "v3_2", "k1"] = "k3"
    """KL(policy, reference) per token: k2, k3 (Schulman 2020), or V3.2's k3 times the ratio; k1 is
    refused with the reason."""
    mismatch: Literal["none", "tis", "mis"] = "none"
    """Weight by old policy / sampler. tis: at most mismatch_cap. mis: 0 where out of bounds."""
    mismatch_level: Literal["token", "sequence"] = "token"
    """Whether that weight is a token's, or the product over the answer."""
    mismatch_cap: float = 2.0
    """Largest weight, C."""
    mismatch_floor: float = 0.0
    """Smallest weight that mis keeps (IcePop's alpha); 0: any."""
    off_policy_delta: float = 0.0
    """Answers of negative advantage whose mean log(sampler / policy) is above this get no policy
    gradient (V3.2, eq. 9, delta); 0: all get it."""
    gap_threshold: float = 0.1
    """Nats between sampler and trainer above which a token is counted in sampler_gap_share."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if typing.get_origin(hints[field.name]) is Literal:
                known = typing.get_args(hints[field.name])
                check_choice(field.name, getattr(self, field.name), known)
        if self.kl_estimator == "k1":
            raise ValueError(K1_REASON)
        self._check_numbers()
        self._check_pairs()

    def _check_numbers(self):
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}; an answer is compared with the others of its "
                "prompt, so give 2 or more"
            )
        for name in ("advantage_eps", "mismatch_cap", "gap_threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        for name in ("clip_low", "clip_high", "kl_coef", "mismatch_floor", "off_policy_delta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or a number above it")
        if self.dual_clip and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip is {self.dual_clip}; give a number above 1, or 0 for none")
        if self.dr_grpo_length < 0:
            raise ValueError(f"dr_grpo_length is {self.dr_grpo_length}; give a number of tokens")

    def _check_pairs(self):
        """Options that would have no effect beside another are errors."""
        if (self.aggregation == "dr_grpo") != (self.dr_grpo_length > 0):
            raise ValueError(
                f"aggregation is {self.aggregation!r} and dr_grpo_length is {self.dr_grpo_length}; "
                "'dr_grpo' divides by that length (give the longest answer in tokens), the others "
                "do not use it (leave it 0)"
            )
        if self.dual_clip and self.ratio == "cispo":
            raise ValueError("dual_clip does nothing with ratio='cispo', which bounds every weight")
        if self.mismatch_floor and self.mismatch != "mis":
            raise ValueError(
                f"mismatch_floor is {self.mismatch_floor} and mismatch is {self.mismatch!r}; only "
                "'mis' leaves small weights out"
            )
        if self.mismatch_floor > self.mismatch_cap:
            raise ValueError(
                f"mismatch_floor is {self.mismatch_floor} and mismatch_cap is {self.mismatch_cap}; "
                "no weight lies between them"
            )


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError, with near matches, unless `value` is one of the words in `known`."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name} is {value!r}; {hint}It is one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task with a verifier (`rl/tasks`): prompts for stage rl, documents for stage pretrain."""

    name: str = ""
    """permutations, search, countdown or arithmetic; empty in stage pretrain: data.sources."""
    options: tuple[str, ...] = ()
    """Options of the task, NAME=VALUE each, such as noise=0.1; the others keep their defaults."""
    documents: int = 30_000
    """Documents of the base corpus that stage pretrain writes."""


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """How a policy gets its answers; what it learns from them is the objective's.

    A rollout of prompts_per_step x objective.group_size answers is cut into updates of
    train.batch_size answers each; every update is a step.
    """

    prompts: str = ""
    """JSON Lines file of prompts with answers, instead of a task; GSM8K's form too."""
    template: Literal["plain", "r1_zero", "chat"] = "plain"
    """How a text of that file is asked. plain: as it is. r1_zero: in a dialogue that asks for
    <think> and <answer> (R1 report, table 1). chat: as the user's turn of the chat template."""
    held_out: float = 0.05
    """Share of that file's problems that are for evaluation only; 0: no evaluation."""
    rewards: tuple[str, ...] = ()
    """FILE.py:FUNCTION or a name of `rl/verdict/rules.py`, with =WEIGHT if it is not 1. They come
    beside a task's verifier; for a file of prompts, empty is accuracy."""
    reward_timeout: float = 5.0
    """Seconds that each of `rewards` has for one answer; then it has failed there. The rewards that
    run code have 25 s or more (`rl/verdict/pool.py:CODE_SECONDS`)."""
    unsafe_code: bool = False
    """Run code that the model writes with your rights, limited in time and memory alone, instead of
    in bubblewrap. Without bubblewrap, a run that judges code is refused unless this is set."""
    prompts_per_step: int = 8
    """Prompts of a rollout."""
    max_new_tokens: int = 256
    """Longest answer in tokens, its end token included; longer ones are cut."""
    temperature: float = 1.0
    """Of the rollout and of the objective's probabilities."""
    top_k: int = 0
    """The rollout draws from the k most probable tokens; 0: from all. The objective's probabilities
    are over the same tokens (V3.2's Keep Sampling Mask)."""
    top_p: float = 1.0
    """Of these, the rollout draws from the most probable that reach this sum. Needs top_k, whose
    list of tokens goes with every token."""
    rollout_rows: int = 0
    """Answers written at a time; a row whose answer has ended takes the next. 0: all."""
    speculate: bool = False
    """Let the MTP module draft tokens of the rollout."""
    resample: int = 0
    """Further rounds of prompts, at most, that a rollout asks in place of groups whose answers all
    got the same reward (DAPO's dynamic sampling, section 3.2)."""
    server: str = ""
    """URL of a server of OpenAI's completions API that answers instead of our sampler, without
    /v1 (`rl/server.py`)."""
    server_model: str = ""
    """Name that this server knows the model by."""
    server_reload: bool = False
    """Write the weights to RUN/served after every rollout and let the server load them; without,
    its weights stay as they are."""
    replay_routing: bool = True
    """Train with the experts that the sampler chose (V3.2's Keep Routing)."""
    reference_every: int = 0
    """Steps after which the reference becomes the policy (R1: 400); 0: it stays the start."""
    format_weight: float = 0.0
    """Weight of the format's reward beside the answer's, which is 1 (R1-Zero: 1)."""
    language_weight: float = 0.0
    """Weight of language consistency: share of the answer in the prompt's language, of a task that
    tells (R1 report, 2.3.2)."""
    overlong_buffer: int = 0
    """Tokens before max_new_tokens in which a reward falls to -1 (DAPO, eq. 13); 0: none."""
    eval_prompts: int = 256
    """Held-out prompts of an evaluation, answered once each, at temperature 1 and greedily."""
    transcripts: int = 4
    """Answers of every rollout that are kept in samples.jsonl."""
    objective: GRPOConfig = GRPOConfig()
    """Advantages, ratio and clip, averages, KL, corrections."""

    def __post_init__(self):
        for name in ("prompts_per_step", "max_new_tokens", "eval_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} is {getattr(self, name)}; give 1 or more")
        for name in (
            "rollout_rows", "resample", "reference_every", "overlong_buffer", "transcripts",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"rl.{name} is {getattr(self, name)}; give 0 or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"rl.temperature is {self.temperature}; give a number above 0: greedy answers to "
                "one prompt are all the same"
            )
        for name in ("format_weight", "language_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"rl.{name} is {getattr(self, name)}; give 0 or more")
        if not 0 < self.reward_timeout < math.inf:
            raise ValueError(
                f"rl.reward_timeout is {self.reward_timeout}; give seconds above 0, such as 60 for "
                "a reward that asks a model"
            )
        self._check_cuts()
        if not 0 <= self.held_out <= 0.9:
            raise ValueError(f"rl.held_out is {self.held_out}; give a share in 0..0.9")
        if (self.server_model or self.server_reload) and not self.server:
            raise ValueError("rl.server_model and rl.server_reload need rl.server, a URL")
        if self.server and not self.server_model:
            raise ValueError("rl.server needs rl.server_model, the name that it knows the model by")
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"rl.overlong_buffer is {self.overlong_buffer}, rl.max_new_tokens "
                f"{self.max_new_tokens}; give a buffer of that or fewer tokens"
            )
        if self.resample and not self.objective.dynamic_sampling:
            raise ValueError(
                f"rl.resample is {self.resample}, but groups without any difference stay in the "
                "loss; set rl.objective.dynamic_sampling (DAPO, eq. 11), or resample to 0"
            )
        if self.reference_every and not self.objective.kl_coef:
            raise ValueError(
                f"rl.reference_every is {self.reference_every}, but without kl_coef there is no "
                "reference; set rl.objective.kl_coef, or reference_every to 0"
            )

    def _check_cuts(self):
        if self.top_k < 0 or self.top_k == 1:
            raise ValueError(
                f"rl.top_k is {self.top_k}; give 2 or more tokens to draw from, or 0 for all"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rl.top_p is {self.top_p}; give more than 0, at most 1")
        if self.top_p < 1 and not self.top_k:
            raise ValueError(
                f"rl.top_p is {self.top_p} without rl.top_k: training needs the list of tokens "
                "that each was drawn from, and top_k bounds its length. Set it, to 64 for example"
            )
        if self.top_k and self.server:
            raise ValueError(
                f"rl.top_k is {self.top_k}, but a server does not tell what it drew from; leave "
                "top_k 0 and top_p 1 with rl.server"
            )

    @property
    def uncut(self) -> "RLConfig":
        """The same with answers as evaluation draws them: at temperature 1, from all tokens."""
        return dataclasses.replace(self, temperature=1.0, top_k=0, top_p=1.0)

    @property
    def answers(self) -> int:
        """Answers of a rollout."""
        return self.prompts_per_step * self.objective.group_size

    def updates(self, batch_size: int) -> int:
        """Updates of `batch_size` answers from one rollout; ValueError if they do not come out."""
        if self.answers % batch_size:
            raise ValueError(
                f"a rollout has rl.prompts_per_step={self.prompts_per_step} x group_size="
                f"{self.objective.group_size} = {self.answers} answers, which train.batch_size="
                f"{batch_size} does not divide; batch_size is answers per update, so give "
                f"{self.answers}, or a divisor for several updates per rollout"
            )
        return self.answers // batch_size


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """What stages sft and distill learn: examples, demonstrations, answers of another policy.

    Sources add up. Traces are the policy's correct answers to training prompts of `task`
    (rejection sampling: R1 report, 2.3.3; for a student distillation: 2.4); they stay in
    RUN/traces, with their provenance, and a run that was stopped goes on after its last round.
    """

    examples: tuple[str, ...] = ()
    """JSON Lines files of conversations or of prompt and completion, or folders of traces."""
    demonstrations: int = 0
    """Correct demonstrations of the task (R1's cold start: thousands)."""
    policy: str = ""
    """Run folder or Hugging Face folder whose answers are sampled; the teacher of stage distill."""
    rounds: int = 4
    """Rounds of sampling, each saved whole."""
    prompts_per_round: int = 256
    """Prompts of a round."""
    answers_per_prompt: int = 4
    """Answers sampled per prompt."""
    per_prompt: int = 2
    """Correct and different answers kept per prompt, at most; 0: all."""
    temperature: float = 1.0
    """Of these answers."""
    max_new_tokens: int = 256
    """Longest of these answers in tokens, its end token included."""
    language: float = 0.0
    """Least share of a trace that is in the prompt's language, 0..1; 0: any."""
    too_long: Literal["error", "leave_out"] = "error"
    """What happens to an example longer than train.seq_len + 1 tokens."""
    kl_weight: float = 0.0
    """Stage distill: weight of KL(teacher, student) beside the cross-entropy, whose weight is
    1 minus that; 0 distils by sequences alone, as R1 does."""
    kl_top_k: int = 16
    """Tokens of the teacher's distribution that the KL tells apart (`rl/examples/distill.py`)."""

    def __post_init__(self):
        for name in ("rounds", "prompts_per_round", "answers_per_prompt", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"sft.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("demonstrations", "per_prompt"):
            if getattr(self, name) < 0:
                raise ValueError(f"sft.{name} is {getattr(self, name)}; give 0 or more")
        for name in ("kl_weight", "language"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"sft.{name} is {getattr(self, name)}; give a number in 0..1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"sft.temperature is {self.temperature}; give a number above 0: greedy answers to "
                "one prompt are all the same"
            )
        if self.kl_top_k < 1:
            raise ValueError(f"sft.kl_top_k is {self.kl_top_k}; give 1 or more")
