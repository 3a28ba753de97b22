"""A training run in numbers: length, batches, optimizer, schedules, loss weights, cadence."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Phase:
    """One piece of a schedule: from the previous phase's value to `value`, ending at `until`."""

    until: float
    """End of the phase, in `unit`s from the start of training."""
    value: float
    """Value at the end of the phase."""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """`constant` holds `value` for the whole phase; the others move to it."""
    unit: Literal["steps", "tokens"] = "tokens"
    """Unit of `until`."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the V3 report (section 4.2), or Muon on matrices with AdamW elsewhere."""

    name: Literal["adamw", "muon"] = "adamw"
    """Update rule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment (not published for V3; the common default)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate."""
    decay_1d: bool = False
    """Also decay norm gains and other 1-D parameters (Moonlight does)."""
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage type of both AdamW moments (V3 report, section 3.3.3: BF16)."""
    muon_momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never scales."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batches, optimizer, schedules and cadence of a run."""

    steps: int
    """Optimizer steps."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per step over all devices, after the ramp."""
    micro_batch_size: int = 0
    """Sequences per forward pass over all devices; gradients add up to batch_size. 0: all."""
    batch_ramp_from: int = 0
    """Sequences per step at the start; grows to batch_size in whole micro batches. 0: no ramp."""
    batch_ramp_tokens: float = 0.0
    """Tokens over which the batch grows linearly."""
    batch_ramp_step: int = 1
    """Micro batches that are added at a time; 2 keeps their number even, as DualPipe wants."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and its constants."""
    learning_rate: tuple[Phase, ...] = ()
    """Learning rate."""
    peak_learning_rate: float = 0.0
    """Highest learning rate: the values of all phases are scaled to it. 0: as the phases say."""
    bias_update_rate: tuple[Phase, ...] = (Phase(0, 0.001),)
    """Speed of the router-bias update, gamma (V3 report, section 2.1.2)."""
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss, alpha (V3 report, eq. 17)."""
    mtp_weight: tuple[Phase, ...] = (Phase(0, 0.3),)
    """Weight of the multi-token-prediction loss, lambda (V3 report, eq. 25)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; master weights, router, norms and losses stay fp32."""
    fp8: bool = False
    """Products of linear layers and experts in FP8, with their gradients (V3 report, section 3.3).
    Needs dtype bfloat16. Embedding, head, router, norms and attention stay as they are."""
    attention_output: Literal["auto", "full", "e5m6", "e4m3"] = "auto"
    """Type in which attention's output waits for the backward pass: its own, 12 or 8 bits, which
    round it. auto: e5m6 with fp8, as V3 (section 3.3.3), else full."""
    remat: Literal["none", "selective", "full"] = "none"
    """Work that the backward pass repeats: none; norms, up-projections, SwiGLU; whole layers."""
    unroll: int = 1
    """Layers that one round of the loop over them computes: more to compile, less to copy. Faster
    for small models on a CPU; not in a pipeline."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    max_skipped_in_row: int = 10
    """Non-finite updates in a row after which the run ends."""
    eval_every: int = 100
    """Steps between evaluations on held-out text (and one at the end); 0 never."""
    eval_batches: int = 8
    """Batches per evaluation; 0 takes the whole held-out set."""
    log_every: int = 1
    """Steps between log records."""
    check_every: int = 0
    """Steps between checks of a micro batch's loss and gradient norm against the plain path in
    fp32, with the same experts; a gap is a warning that names the operation. 0 never. In stage
    pretrain, without a pipeline; it needs memory for the gradients once more."""
