"""Options of the stages after pre-training: objective, task, rollout, and examples to learn.

Options of the objective are named after the papers that they come from. PUBLISHED holds the
objectives of published systems whole.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """The policy objective of one update: advantages, ratio and clip, averages, KL, corrections."""

    group_size: int = 16
    """Answers per prompt, G (R1: 16)."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "gdpo"] = "grpo"
    """Advantage of an answer in its group. grpo: (r - mean) / std. dr_grpo: r - mean (V3.2 too).
    rloo: r - mean of the other answers. gdpo: weighted sum of grpo's for each reward, divided by
    the batch's std."""
    advantage_eps: float = 1e-4
    """Number added to every std; rewards of a group that differ by less than it hardly count."""
    dynamic_sampling: bool = False
    """Leave groups whose answers all got the same reward out of the loss (DAPO, eq. 11)."""
    overlong_filter: bool = False
    """Leave answers that were cut at the length limit out of the loss (DAPO, section 3.4)."""
    ratio: Literal["grpo", "gspo", "gspo_token", "cispo"] = "grpo"
    """Ratio policy / old policy in the loss. grpo: per token. gspo: per answer, length-normalised.
    gspo_token: GSPO's form for per-token advantages. cispo: a clipped constant times log policy
    (MiniMax-M1)."""
    clip_low: float = 0.2
    """Lower clip: ratios below 1 - clip_low are clipped; 1 or more never clips (R1: 10)."""
    clip_high: float = 0.28
    """Upper clip: ratios above 1 + clip_high are clipped (R1: 10, DAPO: 0.28, GSPO: 4e-4)."""
    dual_clip: float = 0.0
    """Bound, above 1, on the ratio of negative advantages (Ye et al. 2020); 0: no bound."""
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """Mean in the loss. dapo: over the batch's tokens. grpo: over each answer's tokens, then over
    answers (DeepSeekMath, R1). dr_grpo: sum over tokens / dr_grpo_length, mean over answers."""
    dr_grpo_length: int = 0
    """Tokens that aggregation dr_grpo divides every answer's sum by: the longest answer's."""
    kl_coef: float = 0.0
    """Weight of the KL term in the loss, beta (R1: 0.001, DeepSeekMath: 0.04); 0: no term."""
    kl_estimator: Literal["k2", "k3", "v3_2"] = "k3"
    """Estimator of KL(policy, reference) per token: k2, k3 (Schulman 2020), or V3.2's k3 times the
    ratio."""
    mismatch: Literal["none", "tis", "mis"] = "none"
    """Weight old policy / sampler on the policy term. tis: at most mismatch_cap. mis: 0 where the
    weight is above mismatch_cap or below mismatch_floor."""
    mismatch_level: Literal["token", "sequence"] = "token"
    """Scope of the mismatch weight: a token's own, or the product over the answer."""
    mismatch_cap: float = 2.0
    """Largest mismatch weight, C."""
    mismatch_floor: float = 0.0
    """Smallest mismatch weight that mis keeps (IcePop's alpha); 0: any."""
    off_policy_delta: float = 0.0
    """Largest mean log(sampler / policy), delta, at which an answer of negative advantage still has
    a policy gradient (V3.2, eq. 9); 0: all have one."""
    gap_threshold: float = 0.1
    """Gap between sampler and trainer, in nats, above which a token counts in
    sampler_gap_share."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if typing.get_origin(hints[field.name]) is Literal:
                known = typing.get_args(hints[field.name])
                check_choice(field.name, getattr(self, field.name), known)
        self._check_numbers()
        self._check_pairs()

    def _check_numbers(self):
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}; an answer is compared with the others of its "
                "prompt, so give 2 or more"
            )
        above = ("advantage_eps", "mismatch_cap", "gap_threshold")
        _check(self, "", above, lambda x: 0 < x < math.inf, "a number above 0")
        least = ("clip_low", "clip_high", "kl_coef", "mismatch_floor", "off_policy_delta")
        _check(self, "", least, lambda x: 0 <= x < math.inf, "0 or a number above it")
        if self.dual_clip and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip is {self.dual_clip}; give a number above 1, or 0 for none")
        if self.dr_grpo_length < 0:
            raise ValueError(f"dr_grpo_length is {self.dr_grpo_length}; give a number of tokens")

    def _check_pairs(self):
        """Options that another option would leave without effect are errors."""
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


_TEMPERATURE = "a number above 0: greedy answers to one prompt are all the same"


def _check(
    config: object, prefix: str, names: Iterable[str], holds: Callable[[Any], bool], wanted: str
) -> None:
    """Raise ValueError, which says what to give, for the first named field that `holds` refuses."""
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"{prefix}{name} is {value}; give {wanted}")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError, with near matches, unless `value` is one of the words in `known`."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name} is {value!r}; {hint}It is one of {', '.join(known)}")


PUBLISHED = {
    # DeepSeekMath (2402.03300), section 4.2; the clip is not stated: PPO's.
    "deepseekmath": GRPOConfig(
        group_size=64, aggregation="grpo", clip_low=0.2, clip_high=0.2, kl_coef=0.04
    ),
    # R1, first RL stage (Nature 2025, methods): a clip of 10 leaves only ratios above 11 clipped.
    "r1": GRPOConfig(aggregation="grpo", clip_low=10.0, clip_high=10.0, kl_coef=0.001),
    # V3.2 (2512.02556), section 3.1; beta and delta are not stated: R1's, and 0.5.
    "v3_2": GRPOConfig(
        advantage="dr_grpo", aggregation="grpo", clip_low=0.2, clip_high=0.2,
        kl_coef=0.001, kl_estimator="v3_2", off_policy_delta=0.5,
    ),
    # DAPO (2503.14476), section 4.1.
    "dapo": GRPOConfig(dynamic_sampling=True, overlong_filter=True),
    # Dr. GRPO (2503.20783): no std, no length; 8 answers of at most 3000 tokens.
    "dr_grpo": GRPOConfig(
        group_size=8, advantage="dr_grpo", aggregation="dr_grpo", dr_grpo_length=3000,
        clip_low=0.2, clip_high=0.2,
    ),
    # GSPO (2507.18071), section 5.1; the group size is not stated.
    "gspo": GRPOConfig(ratio="gspo", aggregation="grpo", clip_low=3e-4, clip_high=4e-4),
    # MiniMax-M1 (2506.13585), section 3.1: no lower bound; the upper one is not stated: weights
    # of at most 5.
    "cispo": GRPOConfig(ratio="cispo", clip_low=10.0, clip_high=4.0),
}  # fmt: skip
"""Objectives of published systems. What a paper does not state is marked so."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task with a verifier (`rl/tasks`): prompts of stage rl, documents of stage pretrain."""

    name: str = ""
    """Name of the task, permutations or search; empty in stage pretrain: data.sources."""
    options: tuple[str, ...] = ()
    """Options of the task, NAME=VALUE each, such as noise=0.1; the others keep their defaults."""
    documents: int = 30_000
    """Documents of the base corpus that stage pretrain writes."""


@dataclasses.dataclass(frozen=True)
class CodeLimits:
    """Limits of a program that a model wrote (`rl/verdict/sandbox.py`)."""

    seconds: float = 6.0
    """Wall time of one program."""
    cpu_seconds: float = 6.0
    """CPU time of one process, rounded up to whole seconds."""
    total_seconds: float = 60.0
    """Wall time of all tests of one answer; what is not done by then has failed."""
    memory_mb: int = 1024
    """Address space, in 2^20 bytes."""
    file_mb: int = 16
    """Largest file that it may write, in 2^20 bytes."""
    output_kb: int = 16_384
    """Standard output in 2^10 bytes, beside twice what is expected; more ends the program."""
    processes: int = 16
    """Processes and threads of the program (with rl.unsafe_code: of the user, above those that run
    when it starts); not counted for root."""

    def __post_init__(self):
        for name in CodeLimits.__dataclass_fields__:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"limit {name} is {value!r}; give a number above 0")


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Rollouts of stage rl: prompts, answers, rewards. The objective says what is learned.

    A rollout of prompts_per_step x objective.group_size answers is cut into updates of
    train.batch_size answers each; every update is a step.
    """

    prompts: str = ""
    """JSON Lines file of prompts with answers, instead of a task; GSM8K's form too."""
    template: Literal["plain", "r1_zero", "chat"] = "plain"
    """Form of a question that rl.prompts has as text. plain: as it is. r1_zero: in a dialogue that
    asks for <think> and <answer> (R1 report, table 1). chat: the user's turn of the chat
    template."""
    held_out: float = 0.05
    """Share of the problems of rl.prompts that are for evaluation only; 0: no evaluation."""
    rewards: tuple[str, ...] = ()
    """Rewards, each FILE.py:FUNCTION or a name of `rl/verdict/rules.py`, with =WEIGHT if that is
    not 1. They add to a task's verifier; for a file of prompts, empty is accuracy."""
    reward_timeout: float = 5.0
    """Seconds that each of rl.rewards has for one answer, after which it has failed there. Rewards
    that run code have rl.code.total_seconds, and 5 s more."""
    unsafe_code: bool = False
    """Run code that the model writes with your rights, limited in time and memory alone, instead of
    in bubblewrap. Without bubblewrap, a run that judges code is refused unless this is set."""
    code: CodeLimits = CodeLimits()
    """Limits of every program that a reward runs."""
    prompts_per_step: int = 8
    """Prompts of a rollout."""
    max_new_tokens: int = 256
    """Longest answer of a rollout in tokens, its end token included; longer ones are cut."""
    temperature: float = 1.0
    """Sampling temperature of the rollout; log-probabilities in the loss use the same."""
    top_k: int = 0
    """Number of most probable tokens that the rollout draws from; 0: all. Log-probabilities in the
    loss are over the same tokens (V3.2's Keep Sampling Mask)."""
    top_p: float = 1.0
    """Probability mass that the rollout draws from: the most probable of the rl.top_k tokens that
    sum to it. Needs top_k, which bounds the list of tokens that training has to know."""
    rollout_rows: int = 0
    """Answers of a rollout written at a time; a row whose answer has ended takes the next. 0:
    all."""
    speculate: bool = False
    """Draft tokens of the rollout with the MTP module."""
    resample: int = 0
    """Most further rounds of prompts that a rollout asks in place of groups whose answers all got
    the same reward (DAPO's dynamic sampling, section 3.2)."""
    server: str = ""
    """URL, without /v1, of a server of OpenAI's completions API that answers prompts instead of our
    sampler (`rl/server.py`)."""
    server_model: str = ""
    """Name that rl.server knows the model by."""
    server_reload: bool = False
    """Write the weights to RUN/served after every rollout and let rl.server load them; without this
    the server's weights stay as they are."""
    replay_routing: bool = True
    """Train with the experts that the sampler chose (V3.2's Keep Routing)."""
    reference_every: int = 0
    """Steps after which the reference becomes the policy (R1: 400); 0: it stays the start."""
    format_weight: float = 0.0
    """Weight of the reward for the format; that of the answer has weight 1 (R1-Zero: 1)."""
    language_weight: float = 0.0
    """Weight of the reward for language consistency: share of the answer in the prompt's language,
    where a task tells it (R1 report, 2.3.2)."""
    overlong_buffer: int = 0
    """Tokens before rl.max_new_tokens in which a reward falls to -1 (DAPO, eq. 13); 0: none."""
    eval_prompts: int = 256
    """Held-out prompts of an evaluation, answered once each, at temperature 1 and greedily."""
    transcripts: int = 4
    """Number of answers of every rollout that samples.jsonl keeps."""
    objective_of: Literal[("", *PUBLISHED)] = ""  # pyright: ignore[reportInvalidTypeForm]
    """Published system whose objective is used; rl.objective.* options given as well override it.
    Empty: the preset's own."""
    objective: GRPOConfig = GRPOConfig()
    """Objective of an update: advantages, ratio and clip, averages, KL, corrections."""

    def __post_init__(self):
        one = ("prompts_per_step", "max_new_tokens", "eval_prompts")
        _check(self, "rl.", one, lambda x: x >= 1, "1 or more")
        none = ("rollout_rows", "resample", "reference_every", "overlong_buffer", "transcripts")
        _check(self, "rl.", none, lambda x: x >= 0, "0 or more")
        _check(self, "rl.", ("temperature",), lambda x: 0 < x < math.inf, _TEMPERATURE)
        weights = ("format_weight", "language_weight")
        _check(self, "rl.", weights, lambda x: 0 <= x < math.inf, "0 or more")
        patience = "seconds above 0, such as 60 for a reward that asks a model"
        _check(self, "rl.", ("reward_timeout",), lambda x: 0 < x < math.inf, patience)
        _check(self, "rl.", ("held_out",), lambda x: 0 <= x <= 0.9, "a share in 0..0.9")
        if self.objective_of:
            check_choice("rl.objective_of", self.objective_of, PUBLISHED)
        if self.objective_of and self.objective == GRPOConfig():
            raise ValueError(
                f"rl.objective_of is {self.objective_of!r}, but rl.objective has the defaults; in "
                "Python take RLConfig().following(name), which sets both"
            )
        self._check_cuts()
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
        """Options with answers as evaluation draws them: at temperature 1, from all tokens."""
        return dataclasses.replace(self, temperature=1.0, top_k=0, top_p=1.0)

    def following(self, name: str) -> "RLConfig":
        """Options with the objective of the published system `name`, one of PUBLISHED."""
        check_choice("rl.objective_of", name, PUBLISHED)
        return dataclasses.replace(self, objective_of=name, objective=PUBLISHED[name])

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
    """Examples that stages sft and distill learn: of files, a task, or another policy.

    Sources add up. A policy's correct answers to training prompts of `task` (rejection sampling: R1
    report, 2.3.3; for a student distillation: 2.4) stay in RUN/traces, with their provenance, and a
    run that was stopped goes on after its last round.
    """

    examples: tuple[str, ...] = ()
    """JSON Lines files of conversations or of prompt and completion, or folders of traces."""
    demonstrations: int = 0
    """Number of correct demonstrations of the task (R1's cold start: thousands)."""
    policy: str = ""
    """Policy whose answers are sampled, the teacher of stage distill: a run folder or Hugging Face
    folder."""
    rounds: int = 4
    """Rounds of sampling answers of sft.policy, each saved whole."""
    prompts_per_round: int = 256
    """Prompts of a round of sampling."""
    answers_per_prompt: int = 4
    """Answers sampled of sft.policy per prompt."""
    per_prompt: int = 2
    """Most correct and different answers kept per prompt; 0: all."""
    temperature: float = 1.0
    """Sampling temperature of the answers of sft.policy."""
    max_new_tokens: int = 256
    """Longest answer of sft.policy in tokens, its end token included."""
    language: float = 0.0
    """Least share of a kept answer that is in the prompt's language, 0..1; 0: any."""
    too_long: Literal["error", "leave_out"] = "error"
    """Fate of an example longer than train.seq_len + 1 tokens."""
    kl_weight: float = 0.0
    """Weight of KL(teacher, student) in the loss of stage distill; the cross-entropy has 1 minus
    that. 0 distils by sequences alone, as R1 does."""
    kl_top_k: int = 16
    """Tokens of the teacher's distribution that the KL of stage distill tells apart."""

    def __post_init__(self):
        one = ("rounds", "prompts_per_round", "answers_per_prompt", "max_new_tokens", "kl_top_k")
        _check(self, "sft.", one, lambda x: x >= 1, "1 or more")
        none = ("demonstrations", "per_prompt")
        _check(self, "sft.", none, lambda x: x >= 0, "0 or more")
        shares = ("kl_weight", "language")
        _check(self, "sft.", shares, lambda x: 0 <= x <= 1, "a number in 0..1")
        _check(self, "sft.", ("temperature",), lambda x: 0 < x < math.inf, _TEMPERATURE)
