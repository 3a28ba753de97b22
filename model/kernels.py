"""Which backend computes each hot path, and why: decided once, before anything is traced.

The kernels of `pallas_kernels` are cut for NVIDIA's Hopper GPUs and bf16. What they cannot do, here
or at all, is found out from the configuration and the devices, and goes to XLA instead.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from model.config import ModelConfig
from model.recipe import Kernels
from pallas_kernels import attention, cross_entropy, decode, fp8, grouped
from pallas_kernels.mosaic import Backend
from sharding.devices import no_cudnn, no_emulator, not_hopper
from sharding.partition import Layout, num_shards, use_layout

Requested = Literal["auto", "mosaic", "emulated", "portable", "reference"]
"""What a user asks for: a backend for all hot paths, or the best for each."""


class Choice(NamedTuple):
    """A decision about every hot path."""

    kernels: Kernels
    reasons: dict[str, str]
    """Why a hot path is not computed by its kernel, by its name in `Kernels`."""
    paths: tuple[str, ...]
    """The hot paths that there are: dense linear layers are one in FP8 alone."""

    def describe(self) -> list[str]:
        """One line per backend in use: the hot paths and, for those without a kernel, why."""
        lines = []
        for backend in dict.fromkeys(self.kernels):
            paths = [name for name in self.paths if getattr(self.kernels, name) == backend]
            if not paths:
                continue
            reasons = dict.fromkeys(self.reasons[name] for name in paths if name in self.reasons)
            why = f" ({'; '.join(reasons)})" if reasons else ""
            lines.append(f"{', '.join(paths)}: {backend}{why}")
        return lines


def choose(
    requested: Requested, config: ModelConfig, dtype: str, layout: Layout, fp8: bool = False
) -> Choice:
    """Backends for a model of activation type `dtype` on a layout, with `fp8` products or without.

    "auto" takes the kernel where devices, types and shapes allow it, cuDNN's attention where that
    is grouped and a GPU, XLA elsewhere. "mosaic" and "emulated" take the kernels alone.

    Raises:
        ValueError: kernels are asked for and one of them cannot run; it names each and the reason.
    """
    obstacles = OBSTACLES | FP8_OBSTACLES if fp8 else OBSTACLES
    if not config.has_experts:
        obstacles = {name: why for name, why in obstacles.items() if name != "experts"}
    if requested in ("portable", "reference"):
        same: dict[str, Backend] = dict.fromkeys(Kernels._fields, requested)
        return Choice(Kernels(**same), {}, tuple(obstacles))
    emulated = requested == "emulated"
    everywhere = no_emulator(layout) if emulated else not_hopper(layout)
    with use_layout(layout):
        reasons = {name: everywhere or why(config, dtype) for name, why in obstacles.items()}
    reasons = {name: why for name, why in reasons.items() if why}
    if requested != "auto" and reasons:
        paths = {why: [n for n in reasons if reasons[n] == why] for why in reasons.values()}
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in paths.items())
        raise ValueError(
            f"kernels={requested} asks for kernels that cannot run here ({listed}); "
            "kernels=auto takes them where they can"
        )
    kernel: Backend = "emulated" if emulated else "mosaic"
    taken: dict[str, Backend] = {name: kernel for name in obstacles if name not in reasons}
    with use_layout(layout):
        if "attention" in reasons and not (no_cudnn(layout) or _cudnn(config, dtype)):
            taken["attention"] = "cudnn"
    return Choice(Kernels(**taken), reasons, tuple(obstacles))


# ---- what stands in a kernel's way ---------------------------------------------------------------


def _attention(config: ModelConfig, dtype: str) -> str | None:
    if num_shards("seq") > 1:
        return "sequences are cut over devices, and the ring of keys is XLA's"
    if config.attention == "grouped":
        return attention.grouped_unsupported(config.v_head_dim, jnp.dtype(dtype))
    sizes = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return attention.unsupported(*sizes, jnp.dtype(dtype))


def _cudnn(config: ModelConfig, dtype: str) -> str | None:
    """What stands in cuDNN's way, which is asked after the kernel."""
    if config.attention != "grouped" or num_shards("seq") > 1:
        return "it computes grouped attention of whole sequences"
    return attention.cudnn_unsupported(config.v_head_dim, jnp.dtype(dtype))


def _decode(config: ModelConfig, dtype: str) -> str | None:
    heads = config.num_heads // num_shards("heads")
    if config.attention == "grouped":
        group = config.num_heads // config.num_kv_heads
        return decode.grouped_unsupported(config.v_head_dim, group, jnp.dtype(dtype))
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    return decode.unsupported(*sizes, heads, jnp.dtype(dtype))


def _experts(config: ModelConfig, dtype: str) -> str | None:
    width = config.expert_ffn_size // num_shards("expert_ffn")
    return grouped.unsupported(config.hidden_size, width, jnp.dtype(dtype))


def _loss(config: ModelConfig, dtype: str) -> str | None:
    vocab = config.vocab_size // num_shards("vocab")
    return cross_entropy.unsupported(config.hidden_size, vocab, jnp.dtype(dtype))


def _fp8_experts(config: ModelConfig, dtype: str) -> str | None:
    width = config.expert_ffn_size // num_shards("expert_ffn")
    return fp8.experts_unsupported(config.hidden_size, width)


def _linear(config: ModelConfig, dtype: str) -> str | None:
    return fp8.linear_unsupported(jnp.dtype(dtype))


OBSTACLES: dict[str, Callable[[ModelConfig, str], str | None]] = {
    "attention": _attention,
    "decode": _decode,
    "experts": _experts,
    "loss": _loss,
}
FP8_OBSTACLES: dict[str, Callable[[ModelConfig, str], str | None]] = {
    "experts": _fp8_experts,
    "linear": _linear,
}
"""Those of FP8 products, instead or as well."""
