"""Presets of the released models: DeepSeek-V2, V2-Lite and V3, Moonlight-16B-A3B and Kimi-K2.

Shapes, then schedules, then the runs made of them. Look at a run on any machine:

    python train.py --config v3_671b --print-config --emulate 8

Sources: V3 report (arXiv 2412.19437), section 4.2; V2 report (arXiv 2405.04434), section 3.1.2 and
appendix B; Moonlight report; the configurations released with the checkpoints. Lengths in tokens
are the reports' own; the step count follows from the batch plan.
"""

import dataclasses

from checkpoint.config import CheckpointConfig
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import ModelConfig, YarnConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig

# ---- Shapes --------------------------------------------------------------------------------------


def v3_model() -> ModelConfig:
    """DeepSeek-V3 and R1 as pre-trained at 4K context; see `extended` for the released 128K."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_ffn_size=18432,
        expert_ffn_size=2048,
        num_experts=256,
        num_shared_experts=1,
        experts_per_token=8,
        num_expert_groups=8,
        groups_per_token=4,
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalize_topk=True,
        routed_scaling_factor=2.5,
        max_position=4096,
        mtp_depth=1,
    )


def v2_model() -> ModelConfig:
    """DeepSeek-V2, 236B: V3's layers with softmax scores, no bias in the routing, and no MTP."""
    return dataclasses.replace(
        v3_model(),
        vocab_size=102400,
        hidden_size=5120,
        num_layers=60,
        num_dense_layers=1,
        dense_ffn_size=12288,
        expert_ffn_size=1536,
        num_experts=160,
        num_shared_experts=2,
        experts_per_token=6,
        groups_per_token=3,
        scoring="softmax",
        topk_method="group_limited_greedy",
        normalize_topk=False,
        routed_scaling_factor=16.0,
        mtp_depth=0,
    )


def v2_lite_model() -> ModelConfig:
    """DeepSeek-V2-Lite, 16B: V2's layers, queries without a latent, no groups of experts."""
    return dataclasses.replace(
        v2_model(),
        hidden_size=2048,
        num_layers=27,
        num_heads=16,
        q_lora_rank=None,
        dense_ffn_size=10944,
        expert_ffn_size=1408,
        num_experts=64,
        num_expert_groups=1,
        groups_per_token=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )


def moonlight_model() -> ModelConfig:
    """Moonlight-16B-A3B: V2-Lite's shape with V3's routing."""
    return dataclasses.replace(
        v2_lite_model(),
        vocab_size=163840,
        dense_ffn_size=11264,
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalize_topk=True,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        max_position=8192,
        norm_eps=1e-5,
    )


def kimi_k2_model() -> ModelConfig:
    """Kimi-K2, 1T: V3's shape with more experts, fewer heads, no groups and no MTP."""
    return dataclasses.replace(
        v3_model(),
        vocab_size=163840,
        num_dense_layers=1,
        num_heads=64,
        num_experts=384,
        num_expert_groups=1,
        groups_per_token=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        mtp_depth=0,
    )


V3_YARN = YarnConfig()
"""V3 and R1 at 128K (and the released configuration's 163,840 positions)."""
V2_YARN = YarnConfig(mscale=0.707, mscale_all_dim=0.707)
"""V2 and V2-Lite at 128K."""
KIMI_K2_YARN = YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0)
"""Kimi-K2 at 128K."""


def extended(model: ModelConfig, yarn: YarnConfig) -> ModelConfig:
    """The model after context extension: YaRN on, positions times its factor."""
    length = int(yarn.original_max_position * yarn.factor)
    return dataclasses.replace(model, yarn=yarn, max_position=length)


# ---- Schedules -----------------------------------------------------------------------------------


V3_BATCH = {"batch_size": 15360, "batch_ramp_from": 3072, "batch_ramp_tokens": 469e9}
"""3072 to 15360 sequences of 4096 tokens over the first 469B tokens."""

V2_TOKENS = 8.1e12
"""Pre-training tokens of V2."""
V2_BATCH = {"batch_size": 9216, "batch_ramp_from": 2304, "batch_ramp_tokens": 225e9}
"""2304 to 9216 sequences of 4096 tokens over the first 225B tokens."""

V2_LITE_TOKENS = 5.7e12
"""Pre-training tokens of V2-Lite."""


def v3_learning_rate() -> tuple[Phase, ...]:
    """2000 steps of warm-up; constant to 10T; cosine to a tenth over 4.3T; constant 333B, 167B."""
    return (
        Phase(2000, 2.2e-4, "linear", "steps"),
        Phase(10e12, 2.2e-4),
        Phase(14.3e12, 2.2e-5, "cosine"),
        Phase(14.633e12, 2.2e-5),
        Phase(14.8e12, 7.3e-6),
    )


def v3_bias_update_rate() -> tuple[Phase, ...]:
    """Gamma: 0.001 for 14.3T tokens, then 0 for the last 500B."""
    return (Phase(14.3e12, 0.001), Phase(14.8e12, 0.0))


def v3_mtp_weight() -> tuple[Phase, ...]:
    """Lambda: 0.3 for the first 10T tokens, 0.1 for the last 4.8T."""
    return (Phase(10e12, 0.3), Phase(14.8e12, 0.1))


def v2_learning_rate() -> tuple[Phase, ...]:
    """Warm-up of 2000 steps to 2.4e-4, then times 0.316 at 60% and at 90% of the tokens."""
    return _step_decay(2.4e-4, V2_TOKENS, 0.6, 0.9)


def v2_lite_learning_rate() -> tuple[Phase, ...]:
    """Warm-up of 2000 steps to 4.2e-4, then times 0.316 at 80% and at 90% of the tokens."""
    return _step_decay(4.2e-4, V2_LITE_TOKENS, 0.8, 0.9)


def _step_decay(peak: float, tokens: float, first: float, second: float) -> tuple[Phase, ...]:
    return (
        Phase(2000, peak, "linear", "steps"),
        Phase(first * tokens, peak),
        Phase(second * tokens, peak * 0.316),
        Phase(tokens, peak * 0.316**2),
    )


# ---- Runs ----------------------------------------------------------------------------------------


def _pretraining(model: ModelConfig, token_ids: int, train: TrainConfig) -> RunConfig:
    """What the runs below share: bf16, selective recomputation, ZeRO-3 over all devices."""
    return RunConfig(
        model=model,
        train=dataclasses.replace(train, dtype="bfloat16", remat="selective", eval_every=1000),
        data=DataConfig(vocab_size=token_ids),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )


def v2_lite() -> RunConfig:
    """DeepSeek-V2-Lite: 15.7 B parameters, 2.7 B active, 5.7 T tokens; fits one 8-GPU host."""
    train = TrainConfig(
        steps=301_997,  # that 5.7 T tokens take
        seq_len=4096,
        batch_size=4608,
        micro_batch_size=64,
        learning_rate=v2_lite_learning_rate(),
        bias_update_rate=(Phase(0, 0.0),),
        balance_weight=0.001,
    )
    return _pretraining(v2_lite_model(), 100018, train)


def moonlight_16b() -> RunConfig:
    """Moonlight-16B-A3B: 16.0 B parameters, 2.9 B active, 5.7 T tokens with Muon.

    Sequences of 8K; weight decay also on norm gains; bias update off in the last stage. It ends
    with 100 steps up to 1e-4 and a linear descent to 0 over 500 B tokens (Moonlight report).
    """
    train = TrainConfig(
        steps=175_834,  # that 5.7 T tokens take: batch 2048, from 200 B tokens on 4096
        seq_len=8192,
        batch_size=4096,
        micro_batch_size=2048,
        batch_ramp_from=2048,
        batch_ramp_tokens=400e9,
        optimizer=OptimizerConfig(name="muon", decay_1d=True),
        learning_rate=(
            Phase(2000, 4.2e-4, "linear", "steps"),
            Phase(5.2e12, 4.2e-5, "cosine"),
            Phase(5.2034e12, 1e-4, "linear"),
            Phase(5.7e12, 0.0, "linear"),
        ),
        bias_update_rate=(Phase(5.2e12, 0.001), Phase(5.7e12, 0.0)),
    )
    return _pretraining(moonlight_model(), 163840, train)


def v2() -> RunConfig:
    """DeepSeek-V2: 236 B parameters, 21.4 B active, 8.1 T tokens.

    V2's expert-level balance loss is trained with its published weight (0.003); its device and
    communication losses and its token dropping belong to a layout that this code does not need.
    """
    train = TrainConfig(
        steps=219_703,  # that 8.1 T tokens take under the batch ramp
        seq_len=4096,
        **V2_BATCH,
        micro_batch_size=768,
        learning_rate=v2_learning_rate(),
        bias_update_rate=(Phase(0, 0.0),),
        balance_weight=0.003,
    )
    return _pretraining(v2_model(), 100018, train)


def v3_671b() -> RunConfig:
    """DeepSeek-V3: 671 B parameters, 37.6 B active, 14.8 T tokens, as published.

    Group-limited routing, loss-free balancing, balance loss, MTP and the fp32 gate are on. The
    batch ramp is taken in 17 plateaus: its published ends and length are kept, its shape is not
    published. Published cost: 2,048 H800, 2,664 K GPU hours, about 1,540 tokens/s per GPU with FP8
    and 16 pipeline stages.
    """
    train = TrainConfig(
        steps=242_830,  # that 14.8 T tokens take under the batch ramp
        seq_len=4096,
        **V3_BATCH,
        micro_batch_size=768,
        learning_rate=v3_learning_rate(),
        bias_update_rate=v3_bias_update_rate(),
        mtp_weight=v3_mtp_weight(),
        fp8=True,
    )
    return _pretraining(v3_model(), 128815, train)


def v3_on_its_layout(run: RunConfig) -> RunConfig:
    """V3's run for `--layout deepseek`: a micro batch is one sequence per device of a stage.

    A stage has 128 devices, so the published ramp begins with 24 micro batches, and DualPipe needs
    twice its 16 stages. The ramp begins at its third plateau instead, 4608 sequences.
    """
    train = dataclasses.replace(
        run.train,
        steps=240_630,  # that 14.8 T tokens take
        batch_ramp_from=4608,
        batch_ramp_step=6,
        micro_batch_size=128,
    )
    return dataclasses.replace(run, train=train)


def kimi_k2() -> RunConfig:
    """Kimi-K2: 1.03 T parameters, 32.9 B active, 15.5 T tokens; V3's code with other values.

    The shape is exact, the training recipe is not: Muon with V3's kind of schedule stands in for
    MuonClip, whose QK-clip is not there.
    """
    train = TrainConfig(
        steps=230_968,  # that 15.5 T tokens take at 16384 sequences of 4096 tokens
        seq_len=4096,
        batch_size=16384,
        micro_batch_size=1024,
        optimizer=OptimizerConfig(name="muon"),
        learning_rate=(
            Phase(500, 2e-4, "linear", "steps"),
            Phase(10e12, 2e-4),
            Phase(15.5e12, 2e-5, "cosine"),
        ),
    )
    return _pretraining(kimi_k2_model(), 163840, train)
