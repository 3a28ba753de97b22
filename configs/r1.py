"""Presets of R1 in small: a base, R1-Zero, the four stages of R1, and a student (`docs/r1.md`).

`runs/r1_zero.sh` and `runs/r1.sh` run them one after the other. All learn to compose permutations,
a task with a corpus of its own, written on first use (`rl/tasks/permutations.py`).
"""

import dataclasses
from typing import Any

from checkpoint.config import CheckpointConfig
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from rl.config import GRPOConfig, RLConfig, SFTConfig, TaskConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig

MUON = OptimizerConfig(name="muon", weight_decay=0.01, moment_dtype="float32")
VOCABULARY = 24
TWO_SCRIPTS_VOCABULARY = 34
"""With the letters of the second script."""
PROMPTS = "scripts=2", "shortest=2"
"""Two to ten moves, in two scripts. A base that reads ten alone answers no other number later."""
READABLE = "share_of_chains=1", "noise=0", "mixing=0"
"""Demonstrations: always chains, without mistakes, in one script."""
ANSWER = 28
"""Tokens of an answer at most."""


def base_model() -> ModelConfig:
    """Shape of every model here but the student: 1.1 M parameters, MLA and MoE in every layer."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_layers=4,
        num_dense_layers=0,
        num_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dense_ffn_size=256,
        expert_ffn_size=64,
        num_experts=8,
        num_shared_experts=1,
        experts_per_token=2,
        max_position=256,
        init_std=0.05,
    )


def schedule(steps: int) -> dict[str, Any]:
    """Fields of TrainConfig: up in 20 steps, level to the middle, down to a tenth; balancing ends
    before the end."""
    return {
        "steps": steps,
        "learning_rate": (
            Phase(20, 4e-3, "linear", "steps"),
            Phase(steps // 2, 4e-3, "constant", "steps"),
            Phase(steps, 4e-4, "cosine", "steps"),
        ),
        "bias_update_rate": balancing(steps),
    }


def balancing(steps: int) -> tuple[Phase, ...]:
    """Update rate of the router biases: on for nine tenths of the run."""
    return (Phase(0.9 * steps, 0.01, unit="steps"), Phase(steps, 0.0, unit="steps"))


RL_RATE, SFT_RATE = 3e-6, 5e-5
"""Learning rates of R1's reinforcement learning and (at its start) fine-tuning (R1 report, B.4)."""


def tuning_rate(train: TrainConfig, rate: float) -> TrainConfig:
    """Pre-training's numbers at another learning rate, for weights that are tuned by a preset of
    pre-training: its own rate would wreck them."""
    warm = 10
    return dataclasses.replace(
        train,
        learning_rate=(
            Phase(warm, rate, "linear", "steps"),
            Phase(max(train.steps, warm + 1), rate, "constant", "steps"),
        ),
    )


def r1_base() -> RunConfig:
    """Base model of `r1_zero`: composed permutations, 70% answered at once, 30% in noisy steps.

    A document stands alone in attention, so the model continues a prompt as it has read them; a
    step has about 100. Muon: with AdamW, 300 steps do not suffice to learn to copy moves. No
    document is held out; `r1_zero` measures on problems that are. All in fp32.
    """
    return RunConfig(
        model=base_model(),
        train=TrainConfig(
            seq_len=192,
            batch_size=12,
            optimizer=MUON,
            **schedule(300),
            eval_every=0,
            log_every=10,
        ),
        data=DataConfig(vocab_size=VOCABULARY, held_out=0.0, fim_rate=0.0, segment_mask=True),
        task=TaskConfig("permutations"),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=0),
    )


def r1_zero() -> RunConfig:
    """R1-Zero in small: GRPO with nothing but right and wrong, from `r1_base`'s weights, no SFT.

    The base writes steps in three answers of ten and errs in one step of seventeen. Rewards alone
    teach it to write them always, and rightly: accuracy and length rise together. 150 rollouts of
    8 prompts x 16 answers, one update each.
    """
    prompts, group = 8, 16
    return dataclasses.replace(
        r1_base(),
        stage="rl",
        train=TrainConfig(
            steps=150,
            seq_len=40,
            batch_size=prompts * group,
            optimizer=OptimizerConfig(weight_decay=0.01, moment_dtype="float32"),
            learning_rate=(Phase(0, 2e-4),),
            eval_every=10,
        ),
        rl=RLConfig(
            prompts_per_step=prompts,
            max_new_tokens=ANSWER,
            replay_routing=False,
            objective=GRPOConfig(group_size=group, clip_low=0.2, clip_high=0.28),
        ),
        checkpoint=CheckpointConfig(every=25),
    )


def two_scripts(run: RunConfig) -> RunConfig:
    """The run on the prompts of the pipeline: ten more letters, two to ten moves."""
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=TWO_SCRIPTS_VOCABULARY),
        data=dataclasses.replace(run.data, vocab_size=TWO_SCRIPTS_VOCABULARY),
        task=TaskConfig("permutations", PROMPTS),
    )


def r1_base2() -> RunConfig:
    """Base of R1's pipeline: `r1_base` with two to ten moves in two scripts, which its chains mix.

    Every stage shares its shape, its tokenizer and its prompts. Longer and with more chains than
    `r1_base`: to follow a move in either script takes longer to learn, and with 30% of chains it
    guesses for 300 to 600 steps.
    """
    base = two_scripts(r1_base())
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **schedule(500)),
        task=TaskConfig("permutations", (*PROMPTS, "share_of_chains=0.6")),
    )


def r1_zero2() -> RunConfig:
    """R1-Zero beside R1's pipeline: `r1_zero` on the pipeline's prompts."""
    return two_scripts(r1_zero())


def tuned(steps: int, rows: int = 12, learning_rate: float = 1e-3) -> TrainConfig:
    """Fine-tuning of the base: R1's cosine to a tenth (R1 report, B.4), at this model's rate."""
    return dataclasses.replace(
        r1_base2().train,
        steps=steps,
        batch_size=rows,
        optimizer=MUON,
        learning_rate=(
            Phase(0, learning_rate, unit="steps"),
            Phase(steps, learning_rate / 10, "cosine", "steps"),
        ),
        bias_update_rate=balancing(steps),
        eval_every=steps,
    )


def r1_cold() -> RunConfig:
    """Cold start of R1: few correct, readable chains before rewards (R1 report, 2.3.1).

    200 demonstrations, 8 epochs.
    """
    return dataclasses.replace(
        r1_base2(),
        stage="sft",
        task=TaskConfig("permutations", (*PROMPTS, *READABLE)),
        train=tuned(30),
        sft=SFTConfig(demonstrations=200),
        rl=RLConfig(max_new_tokens=ANSWER),
    )


def r1_reasoning() -> RunConfig:
    """Reasoning RL of R1: right answers in the prompt's script (R1 report, 2.3.2).

    As `r1_zero`, with language consistency as a reward of its own.
    """
    zero = r1_zero2()
    return dataclasses.replace(
        zero,
        train=dataclasses.replace(zero.train, steps=60, eval_every=20),
        rl=dataclasses.replace(zero.rl, language_weight=1.0),
    )


def r1_sft() -> RunConfig:
    """Third stage of R1: the base again, on answers that its successor got right.

    Rejection sampling from `r1_reasoning` (R1 report, 2.3.3): correct, different, in one script;
    five epochs of some 2,000 traces and 200 demonstrations. R1 adds 200 K examples of other kinds
    in place of the demonstrations.
    """
    return dataclasses.replace(
        r1_cold(),
        train=tuned(120),
        sft=SFTConfig(
            demonstrations=200, rounds=8, prompts_per_round=256, max_new_tokens=ANSWER, language=1.0
        ),
    )


def r1() -> RunConfig:
    """Last stage of R1, RL for all scenarios: all rewards, temperature 0.7 (R1 report, 2.3.4)."""
    base = r1_reasoning()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, steps=40),
        rl=dataclasses.replace(base.rl, temperature=0.7, format_weight=1.0),
    )


def student_model() -> ModelConfig:
    """Shape of the student: half the width and depth of the base, weights of 1 / sqrt(width)."""
    return dataclasses.replace(
        base_model(),
        hidden_size=64,
        num_layers=2,
        expert_ffn_size=32,
        dense_ffn_size=128,
        init_std=0.125,
    )


def r1_student() -> RunConfig:
    """Distillation: 0.2 M parameters from random weights on a larger model's answers (R1, 2.4).

    6,000 traces and more, 12 rows a step.
    """
    base = r1_base()
    return dataclasses.replace(
        base,
        stage="distill",
        model=student_model(),
        train=dataclasses.replace(base.train, **schedule(700), eval_every=100),
        sft=SFTConfig(rounds=8, prompts_per_round=512, per_prompt=2, max_new_tokens=ANSWER),
        rl=RLConfig(max_new_tokens=ANSWER),
    )


def r1_student2() -> RunConfig:
    """Distillation at the end of R1's pipeline: `r1_student` on the pipeline's prompts."""
    return two_scripts(r1_student())
