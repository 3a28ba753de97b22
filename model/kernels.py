"""Which backend computes each hot path, and why: decided once, before anything is traced.

The kernels of `pallas_kernels` are cut for NVIDIA's Hopper GPUs and bf16; other GPUs have those of
a library, where it is installed. What they cannot do, here or at all, is found out from the
configuration and the devices, and goes to XLA instead.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from model.config import ModelConfig
from model.recipe import Kernels
from pallas_kernels import attention, cross_entropy, decode, fp8, grouped, library
from pallas_kernels.mosaic import Backend
from sharding.devices import (
    as_default,
    first_device,
    no_cudnn,
    no_emulator,
    not_hopper,
    on_platform,
)
from sharding.partition import Layout, num_shards, use_layout

Requested = Literal["auto", "mosaic", "emulated", "library", "portable", "reference"]
"""Choices of a user: a backend for all hot paths, or the best for each."""


class Choice(NamedTuple):
    """A decision about every hot path."""

    kernels: Kernels
    reasons: dict[str, str]
    """Reason why our kernel does not compute a hot path, by its name in `Kernels`."""
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

    "auto" takes our kernels on Hopper and the library's on other GPUs, where types and shapes allow
    it, cuDNN's attention where that is grouped, XLA elsewhere. "library" takes the library's
    wherever it has one. "mosaic" and "emulated" take our kernels alone.

    Raises:
        ValueError: kernels are asked for and cannot run; it names each and the reason.
    """
    obstacles = _obstacles(config, fp8)
    if requested in ("portable", "reference"):
        same: dict[str, Backend] = dict.fromkeys(Kernels._fields, requested)
        return Choice(Kernels(**same), {}, tuple(obstacles))
    if requested == "library" or (requested == "auto" and not_hopper(layout)):
        choice = _from_library(requested, config, dtype, layout, fp8)
        return _with_cudnn(choice, config, dtype, layout)
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
    choice = Choice(Kernels(**taken), reasons, tuple(obstacles))
    return choice if requested != "auto" else _with_cudnn(choice, config, dtype, layout)


def _obstacles(config: ModelConfig, fp8: bool) -> dict[str, "Obstacle"]:
    """The hot paths that a model has, with what says why a kernel of ours cannot compute them."""
    found = OBSTACLES | FP8_OBSTACLES if fp8 else OBSTACLES
    return {name: why for name, why in found.items() if name != "experts" or config.has_experts}


def _with_cudnn(choice: Choice, config: ModelConfig, dtype: str, layout: Layout) -> Choice:
    """The choice with cuDNN's attention in place of XLA's, where that is grouped and a GPU is."""
    with use_layout(layout):
        refused = no_cudnn(layout) or _context_parallel() or config.attention != "grouped"
    if choice.kernels.attention != "portable" or refused:
        return choice
    if attention.cudnn_unsupported(config.v_head_dim, jnp.dtype(dtype)):
        return choice
    return choice._replace(kernels=choice.kernels._replace(attention="cudnn"))


def _from_library(
    requested: Requested, config: ModelConfig, dtype: str, layout: Layout, fp8: bool
) -> Choice:
    """The library's kernels, and XLA for what it has none for."""
    paths = tuple(_obstacles(config, fp8))
    missing, ours = library.unusable(first_device(layout)), not_hopper(layout)
    if requested == "library" and missing:
        raise ValueError(f"kernels=library cannot run here: {missing}; kernels=auto can")
    if missing or not on_platform(layout, "cuda", "gpu"):
        why = f"{ours}; {missing}" if on_platform(layout, "cuda", "gpu") else str(ours)
        return Choice(Kernels(), dict.fromkeys(paths, why), paths)
    with use_layout(layout), as_default(layout):
        refusals = {
            "attention": _context_parallel() or _library_attention(config, dtype),
            "experts": _library_experts(config, dtype, fp8),
        }
    refusals = LIBRARY_LACKS | refusals
    if config.attention == "grouped":
        refusals |= dict.fromkeys(("attention", "decode"), "the library is asked for latent heads")
    taken: dict[str, Backend] = {name: "library" for name in paths if not refusals[name]}
    why = "asked for" if requested == "library" else str(ours)
    return Choice(Kernels(**taken), {name: refusals[name] or why for name in paths}, paths)


def on_planned_host(
    requested: Requested, choice: Choice, config: ModelConfig, dtype: str, layout: Layout
) -> Kernels:
    """Kernels of a choice for GPUs that are planned: their host has the library, which `make
    gpu-env` installs, whether this one has it or not."""
    absent = requested == "auto" and library.missing() and not_hopper(layout)
    if not absent or choice.kernels.attention != "portable" or config.attention == "grouped":
        return choice.kernels
    with use_layout(layout):  # shapes that ours take, so does the library
        refused = _attention(config, dtype)
    return choice.kernels if refused else choice.kernels._replace(attention="library")


# ---- what stands in a kernel's way ---------------------------------------------------------------


def _context_parallel() -> str | None:
    if num_shards("seq") > 1:
        return "sequences are cut over devices, and the ring of keys is XLA's"
    return None


def _attention(config: ModelConfig, dtype: str) -> str | None:
    if why := _context_parallel():
        return why
    if config.attention == "grouped":
        return attention.grouped_unsupported(config.v_head_dim, jnp.dtype(dtype))
    sizes = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return attention.unsupported(*sizes, jnp.dtype(dtype))


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


Obstacle = Callable[[ModelConfig, str], str | None]
OBSTACLES: dict[str, Obstacle] = {
    "attention": _attention,
    "decode": _decode,
    "experts": _experts,
    "loss": _loss,
}
FP8_OBSTACLES: dict[str, Obstacle] = {
    "experts": _fp8_experts,
    "linear": _linear,
}
"""Backends of FP8 products, instead or as well."""


def _library_attention(config: ModelConfig, dtype: str) -> str | None:
    sizes = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return library.attention_refusal(*sizes, jnp.dtype(dtype))


def _library_experts(config: ModelConfig, dtype: str, fp8: bool) -> str | None:
    width = config.expert_ffn_size // num_shards("expert_ffn")
    if fp8:
        return library.fp8_experts_refusal(config.hidden_size, width)
    return library.experts_refusal(config.hidden_size, width, jnp.dtype(dtype))


LIBRARY_LACKS: dict[str, str | None] = {
    "decode": "the library has no kernel for a value of the latent's width, only for heads' widths",
    "loss": "the library computes it by XLA too",
    "linear": "the library has no FP8 product for dense layers",
}
"""Hot paths for which the library has nothing on GPUs."""
