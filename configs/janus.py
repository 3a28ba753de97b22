"""Janus-Pro: both released sizes with their three stages of training, and a tiny one for a CPU.

Sources: Janus-Pro report (arXiv 2501.17811), tables 1 and 2; the published code. What neither says,
or what was not seen in the released files, is marked unverified.
"""

from checkpoint.config import CheckpointConfig
from configs.dense import dense_fields
from configs.schema import RunConfig
from data.config import DataConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig
from vision.config import EncoderConfig, ImageTraining, JanusConfig, Learned, TokenizerConfig

ADAMW = OptimizerConfig(weight_decay=0.0)
"""AdamW 0.9, 0.95, no decay, clipping at 1."""


def model(size: int, layers: int, heads: int, ffn: int) -> JanusConfig:
    """Janus-Pro around a language model of these sizes."""
    return JanusConfig(**dense_fields(layers, size, heads, heads, ffn, 102400))


def _stage(
    shape: JanusConfig,
    learned: Learned,
    rate: float,
    warm_up: int,
    steps: int,
    batch: int,
    shares: tuple[float, float, float],
) -> RunConfig:
    """A stage of the report's table 2: constant learning rate, after a warm-up."""
    read, text, draw = shares
    phases = (Phase(warm_up, rate, "linear", "steps"),) if warm_up else ()
    return RunConfig(
        model=shape,
        stage="images",
        train=TrainConfig(
            steps=steps,
            seq_len=4096,
            batch_size=batch,
            learning_rate=(*phases, Phase(steps, rate, "constant", "steps")),
            optimizer=ADAMW,
            dtype="bfloat16",
            remat="selective",
            eval_every=0,
        ),
        images=ImageTraining(learned=learned, read=read, text=text, draw=draw),
        data=DataConfig(vocab_size=shape.vocab_size),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )


def _first(shape: JanusConfig) -> RunConfig:
    return _stage(shape, "adaptors", 1e-3, 600, 20_000, 256, (1, 0, 3))


def _second(shape: JanusConfig) -> RunConfig:
    return _stage(shape, "language", 1e-4, 5000, 360_000, 512, (2, 3, 5))


def _third(shape: JanusConfig, steps: int) -> RunConfig:
    return _stage(shape, "reading", 4e-5, 0, steps, 128, (5, 1, 4))


def pro_1b() -> JanusConfig:
    """1B. Unverified: the MLP's width of 5632, the context (the report's 4096), the rotary base."""
    return model(2048, 24, 16, 5632)


def pro_7b() -> JanusConfig:
    """7B. Unverified: the MLP's width of 11008, the generation head's width of 4096, the context,
    the rotary base."""
    return model(4096, 30, 32, 11008)


def janus_pro_1b() -> RunConfig:
    """Janus-Pro-1B, stage I: adaptors and generation head.

    20 K steps of 256 rows, learning rate 1e-3 after 600 steps, understanding : text : generation
    1 : 0 : 3. Give it data, and weights of the language model and both encoders:

        python train.py --config janus_pro_1b --images.records pairs.jsonl --init-from DIR

    Unverified: the language model's MLP of 5632 and its rotary base of 10000 (the code's default);
    the encoder's last layer as its output (as in transformers); a mean and deviation of 0.5 for
    images (the published grey of 127 implies the mean); whether the generation table is learned in
    stage I; the share of 10% of examples without words.
    """
    return _first(pro_1b())


def janus_pro_1b_stage2() -> RunConfig:
    """Janus-Pro-1B, stage II: all but the two encoders.

    Planned are 360 K steps of 512 rows, stopped at 270 K; learning rate 1e-4 after 5000 steps;
    understanding : text : generation 2 : 3 : 5. Unverified: as in stage I.
    """
    return _second(pro_1b())


def janus_pro_1b_stage3() -> RunConfig:
    """Janus-Pro-1B, stage III: all but the image tokenizer.

    80 K steps of 128 rows, learning rate 4e-5, understanding : text : generation 5 : 1 : 4.
    Unverified: as in stage I.
    """
    return _third(pro_1b(), 80_000)


def janus_pro_7b() -> RunConfig:
    """Janus-Pro-7B, stage I: adaptors and generation head.

    As `janus_pro_1b`. Unverified besides: the language model's MLP of 11008, and the generation
    head's width of 4096, the language model's.
    """
    return _first(pro_7b())


def janus_pro_7b_stage2() -> RunConfig:
    """Janus-Pro-7B, stage II: all but the two encoders. Unverified: as in stage I."""
    return _second(pro_7b())


def janus_pro_7b_stage3() -> RunConfig:
    """Janus-Pro-7B, stage III: all but the image tokenizer; 40 K steps. Unverified: as in stage
    I."""
    return _third(pro_7b(), 40_000)


VOCAB = 512
TINY_TOKENIZER_STEPS, TINY_STEPS = 800, 1000
MUON = OptimizerConfig(name="muon", weight_decay=0.1)
"""By AdamW captions are learned by heart; unseen shapes and colours are paired wrongly."""


def tiny_model() -> JanusConfig:
    """Reads and draws 32 x 32 pixels: 16 patches, 16 codes."""
    return JanusConfig(
        **dense_fields(4, 128, 4, 4, 384, VOCAB),
        max_position=256,
        encoder=EncoderConfig(64, 2, 4, 192, image_size=32, patch_size=8),
        tokenizer=TokenizerConfig(
            num_codes=256, latent_width=32, base_width=32, multipliers=(1, 1, 2, 2), num_blocks=1
        ),
        drawn_tokens=16,
        image_token_id=VOCAB - 3,
    )


def _tiny(learned: Learned, optimizer: OptimizerConfig, steps: int, batch: int) -> RunConfig:
    rate = 2e-3
    return RunConfig(
        model=tiny_model(),
        stage="images",
        train=TrainConfig(
            steps=steps,
            seq_len=80,  # two examples of any kinds
            batch_size=batch,
            learning_rate=(
                Phase(steps // 20, rate, "linear", "steps"),
                Phase(steps // 2, rate, "constant", "steps"),
                Phase(steps, rate / 20, "cosine", "steps"),
            ),
            optimizer=optimizer,
            eval_every=0,
            log_every=10,
        ),
        images=ImageTraining(learned=learned, images_per_row=2, read=1, draw=2),
        data=DataConfig(vocab_size=VOCAB),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )


def janus_tiny_tokenizer() -> RunConfig:
    """The image tokenizer of `janus_tiny`, learned from drawn scenes; 0.6 M parameters.

    `make janus` runs it first. LlamaGen's loss without its perceptual and adversarial terms.
    """
    return _tiny("tokenizer", ADAMW, TINY_TOKENIZER_STEPS, 16)


def janus_tiny() -> RunConfig:
    """Janus, tiny: reads and draws scenes of coloured shapes on a CPU.

    `make janus` learns its image tokenizer first (`janus_tiny_tokenizer`) and then, in one stage
    from random weights, all else: questions about pictures and drawing from captions, 1 : 2.
    """
    return _tiny("reading", MUON, TINY_STEPS, 24)
