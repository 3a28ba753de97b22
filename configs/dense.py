"""Presets of dense models: Qwen2.5 and Llama 3, R1's students made of them, and small ones for CPU.

Sources: the configurations released with the checkpoints; "The Llama 3 Herd of Models" (arXiv
2407.21783), section 3.4 and table 3; R1 report (arXiv 2501.12948), B.4.3 and table 6. Qwen's
pre-training recipe is not published: Llama's kind of schedule stands in for it.

    python train.py --config llama31_405b --print-config --emulate 8
"""

import dataclasses
from typing import Any

from checkpoint.config import CheckpointConfig
from configs import r1
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import BandsConfig, ModelConfig
from rl.config import SFTConfig
from sharding.config import MeshConfig
from training.config import Phase, TrainConfig

# ---- Shapes --------------------------------------------------------------------------------------


def dense_fields(
    layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocabulary: int
) -> dict[str, Any]:
    """What all of them share: grouped attention, half-split pairs, no experts."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_layers": layers,
        "num_dense_layers": layers,
        "num_heads": heads,
        "attention": "grouped",
        "num_kv_heads": kv_heads,
        "qk_rope_head_dim": width // heads,
        "v_head_dim": width // heads,
        "dense_ffn_size": ffn,
        "rope_interleaved": False,
        "init_std": 0.02,
    }


def qwen25_model(
    layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, eps: float
) -> ModelConfig:
    """Qwen2.5: biases on queries, keys and values."""
    shape = dense_fields(layers, width, heads, kv_heads, ffn, vocabulary)
    return ModelConfig(**shape, qkv_bias=True, rope_theta=1e6, norm_eps=eps, max_position=131072)


def qwen25_1_5b_model() -> ModelConfig:
    """Qwen2.5-1.5B; the head is the embedding."""
    shape = qwen25_model(28, 1536, 12, 2, 8960, 151936, 1e-6)
    return dataclasses.replace(shape, tie_embeddings=True)


def qwen25_7b_model() -> ModelConfig:
    """Qwen2.5-7B."""
    return qwen25_model(28, 3584, 28, 4, 18944, 152064, 1e-6)


def qwen25_14b_model() -> ModelConfig:
    """Qwen2.5-14B."""
    return qwen25_model(48, 5120, 40, 8, 13824, 152064, 1e-5)


def qwen25_32b_model() -> ModelConfig:
    """Qwen2.5-32B."""
    return qwen25_model(64, 5120, 40, 8, 27648, 152064, 1e-5)


def llama3_model(layers: int, width: int, heads: int, ffn: int) -> ModelConfig:
    """Llama 3.1 and 3.3, at 128K: eight key heads, frequencies by bands."""
    shape = dense_fields(layers, width, heads, 8, ffn, 128256)
    bands = BandsConfig()
    return ModelConfig(**shape, rope_theta=5e5, bands=bands, norm_eps=1e-5, max_position=131072)


def llama31_8b_model() -> ModelConfig:
    """Llama 3.1 8B."""
    return llama3_model(32, 4096, 32, 14336)


def llama33_70b_model() -> ModelConfig:
    """Llama 3.3 70B, of 3.1's shape."""
    return llama3_model(80, 8192, 64, 28672)


def llama31_405b_model() -> ModelConfig:
    """Llama 3.1 405B."""
    return llama3_model(126, 16384, 128, 53248)


def _from_math(model: ModelConfig) -> ModelConfig:
    """A student that comes from Qwen2.5-Math: another base of its rotations, a head of its own."""
    return dataclasses.replace(model, rope_theta=10000.0, tie_embeddings=False)


# ---- Pre-training --------------------------------------------------------------------------------


def _pretraining(
    model: ModelConfig, token_ids: int, tokens: float, batch: int, rate: float, micro: int
) -> RunConfig:
    """bf16, ZeRO-3 over all devices: 8,000 steps of warm-up, then a cosine to a hundredth of the
    rate (Llama 3 report, 3.4.1), in sequences of 8,192 tokens that see their own document alone.

    The model is the released one, rotations of its long context included, so that --init-from takes
    the release as it is.
    """
    steps = int(tokens / (batch * 8192))
    train = TrainConfig(
        steps=steps,
        seq_len=8192,
        batch_size=batch,
        micro_batch_size=micro,
        learning_rate=(
            Phase(8000, rate, "linear", "steps"),
            Phase(steps, rate / 100, "cosine", "steps"),
        ),
        dtype="bfloat16",
        remat="selective",
        eval_every=1000,
    )
    return RunConfig(
        model=model,
        train=train,
        data=DataConfig(vocab_size=token_ids, fim_rate=0.0, segment_mask=True),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )


def qwen25_1_5b() -> RunConfig:
    """Qwen2.5-1.5B: 1.5 B parameters; the shape is exact, the training recipe is Llama's kind."""
    return _pretraining(qwen25_1_5b_model(), 151665, 18e12, 1024, 3e-4, 64)


def qwen25_7b() -> RunConfig:
    """Qwen2.5-7B: 7.6 B parameters; the shape is exact, the training recipe is Llama's kind."""
    return _pretraining(qwen25_7b_model(), 151665, 18e12, 1024, 3e-4, 64)


def qwen25_14b() -> RunConfig:
    """Qwen2.5-14B: 14.8 B parameters; the shape is exact, the training recipe is Llama's kind."""
    return _pretraining(qwen25_14b_model(), 151665, 18e12, 2048, 2e-4, 64)


def qwen25_32b() -> RunConfig:
    """Qwen2.5-32B: 32.8 B parameters; the shape is exact, the training recipe is Llama's kind."""
    return _pretraining(qwen25_32b_model(), 151665, 18e12, 2048, 1.5e-4, 64)


def llama31_8b() -> RunConfig:
    """Llama 3.1 8B: 8.0 B parameters, 15 T tokens; batch and schedule as of 405B."""
    return _pretraining(llama31_8b_model(), 128256, 15e12, 2048, 3e-4, 256)


def llama33_70b() -> RunConfig:
    """Llama 3.3 70B: 70.6 B parameters, 15 T tokens; batch and schedule as of 405B."""
    return _pretraining(llama33_70b_model(), 128256, 15e12, 2048, 1.5e-4, 256)


def llama31_405b() -> RunConfig:
    """Llama 3.1 405B: 405.9 B parameters, 15.6 T tokens on 16,384 H100, as published.

    Published: 8,000 steps of warm-up to 8e-5, cosine to 8e-7 over 1.2 M steps, batches of 4 M
    tokens at 4K, from 252 M tokens on 8 M at 8K, from 2.87 T on 16 M; 30.84 M GPU hours. Here the
    last batch stands for all, so that the schedule ends with the tokens, not after 1.2 M steps.
    """
    return _pretraining(llama31_405b_model(), 128256, 15.6e12, 2048, 8e-5, 256)


# ---- R1's students -------------------------------------------------------------------------------

EXAMPLES = 800_000
"""R1's supervised examples: 600 K of reasoning, 200 K of other kinds (R1 report, 2.3.3)."""


def _student(model: ModelConfig, rate: float) -> RunConfig:
    """SFT on R1's answers: cosine to a tenth over two epochs, 64 sequences of 32,768 tokens.

    Two of the report's "2-3 epochs", with an example counted as a sequence: give the examples with
    --sft.examples, the base with --init-from, and train.steps for rows that hold several.
    """
    steps = 2 * EXAMPLES // 64
    return RunConfig(
        model=model,
        stage="sft",
        train=TrainConfig(
            steps=steps,
            seq_len=32768,
            batch_size=64,
            micro_batch_size=8,
            learning_rate=(
                Phase(0, rate, unit="steps"),
                Phase(steps, rate / 10, "cosine", "steps"),
            ),
            dtype="bfloat16",
            remat="selective",
            eval_every=0,
        ),
        mesh=MeshConfig(fsdp=-1),
        sft=SFTConfig(too_long="leave_out"),
        checkpoint=CheckpointConfig(every=1000),
    )


def r1_distill_qwen_1_5b() -> RunConfig:
    """R1-Distill-Qwen-1.5B: 1.8 B parameters, from Qwen2.5-Math-1.5B, whose head is its embedding.

    The released student has a head of its own: it begins as the base's embedding.
    """
    return _student(_from_math(qwen25_1_5b_model()), 1e-4)


def r1_distill_qwen_7b() -> RunConfig:
    """R1-Distill-Qwen-7B: from Qwen2.5-Math-7B."""
    return _student(_from_math(qwen25_7b_model()), 8e-5)


def r1_distill_qwen_14b() -> RunConfig:
    """R1-Distill-Qwen-14B: from Qwen2.5-14B."""
    return _student(qwen25_14b_model(), 7e-5)


def r1_distill_qwen_32b() -> RunConfig:
    """R1-Distill-Qwen-32B: from Qwen2.5-32B."""
    return _student(qwen25_32b_model(), 6e-5)


def r1_distill_llama_8b() -> RunConfig:
    """R1-Distill-Llama-8B: from Llama 3.1 8B."""
    return _student(llama31_8b_model(), 5e-5)


def r1_distill_llama_70b() -> RunConfig:
    """R1-Distill-Llama-70B: from Llama 3.3 70B Instruct."""
    return _student(llama33_70b_model(), 2e-5)


# ---- In small ------------------------------------------------------------------------------------


def tiny_dense() -> RunConfig:
    """Tiny dense: 0.9 M parameters that learn Python source text on a CPU.

    Everything that grouped attention may have: four queries to a key head, biases, frequencies by
    bands, a tied head.
    """
    steps = 300
    return RunConfig(
        model=ModelConfig(
            **dense_fields(4, 128, 8, 2, 384, 2048),
            qkv_bias=True,
            tie_embeddings=True,
            bands=BandsConfig(factor=4.0, original_max_position=64),
            max_position=256,
        ),
        train=TrainConfig(
            steps=steps,
            seq_len=256,
            batch_size=8,
            learning_rate=(
                Phase(steps // 20, 3e-3, "linear", "steps"),
                Phase(steps, 3e-4, "cosine", "steps"),
            ),
            eval_every=50,
            eval_batches=4,
        ),
        data=DataConfig(vocab_size=2048),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=100),
    )


def small_student() -> ModelConfig:
    """Shape of the dense student of the permutation task: 0.2 M parameters, as its MLA twin has."""
    shape = dense_fields(2, 64, 4, 2, 384, r1.VOCABULARY)
    model = ModelConfig(**shape, qk_norm=True, max_position=256)
    return dataclasses.replace(model, init_std=0.125)


def r1_student_dense() -> RunConfig:
    """Distillation into a dense model: `r1_student` with grouped attention and no experts."""
    return dataclasses.replace(r1.r1_student(), model=small_student())


def r1_zero_dense() -> RunConfig:
    """RL on a dense model: `r1_zero` on the student's shape, from weights of `r1_student_dense`."""
    return dataclasses.replace(r1.r1_zero(), model=small_student())
