"""Rotary position embedding and its extensions: YaRN (V3 report, sections 2.1.1 and 4.3), bands.

Letters: B batch, T sequence, N heads, R rope channels, J = R/2 rotated pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import BandsConfig, ModelConfig, YarnConfig


def _mscale(factor: float, coefficient: float) -> float:
    """YaRN's attention temperature: 0.1 * coefficient * ln(factor) + 1."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def _ramp(yarn: YarnConfig, size: int, theta: float) -> np.ndarray:
    """Share of interpolation per pair, 0 (keep the frequency) to 1 (divide it by the factor)."""

    def pair_with(rotations: float) -> float:
        # The pair that turns `rotations` times over the original context.
        wavelength = yarn.original_max_position / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), size - 1)
    # A ramp of no width (beta_fast = beta_slow on a pair) is a step; 0.001 keeps it finite.
    width = (high - low) or 0.001
    return np.clip((np.arange(size // 2) - low) / width, 0.0, 1.0)


def _by_bands(bands: BandsConfig, plain: np.ndarray) -> np.ndarray:
    """Fast pairs as they are, slow ones slowed by the factor, and a blend in between."""
    turns = bands.original_max_position * plain / (2 * math.pi)
    low, high = bands.low_freq_factor, bands.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * kept + plain / bands.factor * (1 - kept)


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotated pair [J], float64."""
    size = config.qk_rope_head_dim
    plain = config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if config.bands is not None:
        return _by_bands(config.bands, plain)
    if config.yarn is None:
        return plain
    ramp = _ramp(config.yarn, size, config.rope_theta)
    return plain * (1 - ramp) + plain / config.yarn.factor * ramp


def softmax_scale(config: ModelConfig) -> float:
    """Factor on the attention logits: qk_head_dim^-1/2, times m^2 once YaRN extends the context."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def rotation(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles, fp32 [B, T, J].

    The temperature ratio mscale / mscale_all_dim multiplies both; it is 1 for every released model.
    """
    angle_BTJ = positions_BT[..., None].astype(jnp.float32) * frequencies(config).astype(np.float32)
    ratio = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        # Without mscale_all_dim the temperature sits on cos and sin instead of on the scale.
        ratio = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angle_BTJ) * ratio, jnp.sin(angle_BTJ) * ratio


def rotate(
    x_BTNR: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array, interleaved: bool
) -> jax.Array:
    """Rotate the pairs of every head; pairs are (0,1),(2,3).. if interleaved, else (j, j+R/2).

    The result holds first members then second members. Queries and keys go through the same
    permutation, so their products do not see it.
    """
    x32 = x_BTNR.astype(jnp.float32)
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    cos, sin = cos_BTJ[:, :, None], sin_BTJ[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNR.dtype)
