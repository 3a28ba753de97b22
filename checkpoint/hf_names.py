"""Names of a Hugging Face DeepSeek checkpoint and places in our parameter tree, both ways.

One table (`table`) states, for each array of ours, the tensors it is made of and their layout;
`hf_reader.py`, `hf_import.py` and `hf_writer.py` walk it. Three facts cover all layouts:
  - a checkpoint stores a matrix as [out, in], we store [in..., out...], heads on their own axes.
    Per head, q_b rows are [nope | rope] and kv_b rows [k_nope | v], as in our head_dim axes;
  - we stack equal layers and experts along leading axes, a checkpoint has one tensor for each;
  - MTP module k is the checkpoint's layer `num_hidden_layers + k`.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from checkpoint import janus_names
from checkpoint.entries import PARAMS, ROUTER_BIAS, Entry
from model.config import ModelConfig
from vision.config import JanusConfig

# Old exports store the rotary frequencies, which the configuration determines.
DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


def table(config: ModelConfig) -> list[Entry]:
    """Every array of ours with the checkpoint tensors it holds."""
    if isinstance(config, JanusConfig):
        return janus_names.table(config, _language(config))
    return _language(config)


def _language(config: ModelConfig) -> list[Entry]:
    """The arrays of a language model."""
    c, d = config, config.hidden_size
    k, L, D = c.num_dense_layers, c.num_layers, c.mtp_depth
    entries = [
        _single("embed/table", "model.embed_tokens.weight", (c.vocab_size, d)),
        _single("final_norm/scale", "model.norm.weight", (d,)),
    ]
    if not c.tie_embeddings:
        entries.append(_single("head/kernel", "lm_head.weight", (c.vocab_size,), (d,)))
    attention = [*_norms(c), *{"mla": _latent, "grouped": _grouped}[c.attention](c)]
    if k:
        entries += _stacked("dense_layers", range(k), [*attention, *_dense(c)])
    if k < L:
        entries += _stacked("moe_layers", range(k, L), [*attention, *_experts(c)])
    if D:
        block = [
            dataclasses.replace(entry, path=f"block/{entry.path}")
            for entry in [*attention, *_experts(c)]
        ]
        outside = [
            _single("embed_norm/scale", "enorm.weight", (d,)),
            _single("hidden_norm/scale", "hnorm.weight", (d,)),
            # Embedding in the first half of the inputs, hidden state in the second, on both sides.
            _single("proj/kernel", "eh_proj.weight", (d,), (2 * d,)),
            _single("out_norm/scale", "shared_head.norm.weight", (d,)),
        ]
        entries += _stacked("mtp", range(L, L + D), [*outside, *block])
    return entries


def _norms(c: ModelConfig) -> Iterator[Entry]:
    """The two norms of a block."""
    yield _single("attn_norm/scale", "input_layernorm.weight", (c.hidden_size,))
    yield _single("ffn_norm/scale", "post_attention_layernorm.weight", (c.hidden_size,))


def _grouped(c: ModelConfig) -> Iterator[Entry]:
    """Attention with heads of keys that groups of queries share."""
    d, width = c.hidden_size, c.qk_head_dim
    for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        yield _single(f"attn/w_{name}", f"self_attn.{name}_proj.weight", (heads, width), (d,))
        if c.qkv_bias:
            yield _single(f"attn/b_{name}", f"self_attn.{name}_proj.bias", (heads, width), ())
        if c.qk_norm and name != "v":
            yield _single(f"attn/{name}_norm/scale", f"self_attn.{name}_norm.weight", (width,))
    yield _single("attn/w_o", "self_attn.o_proj.weight", (d,), (c.num_heads, width))


def _latent(c: ModelConfig) -> Iterator[Entry]:
    """Latent attention."""
    d, H, latent = c.hidden_size, c.num_heads, c.kv_lora_rank
    if c.q_lora_rank is None:
        yield _single("attn/w_q", "self_attn.q_proj.weight", (H, c.qk_head_dim), (d,))
    else:
        r = c.q_lora_rank
        yield _single("attn/w_dq", "self_attn.q_a_proj.weight", (r,), (d,))
        yield _single("attn/q_norm/scale", "self_attn.q_a_layernorm.weight", (r,))
        yield _single("attn/w_uq", "self_attn.q_b_proj.weight", (H, c.qk_head_dim), (r,))
    down = latent + c.qk_rope_head_dim
    yield _single("attn/w_dkv", "self_attn.kv_a_proj_with_mqa.weight", (down,), (d,))
    yield _single("attn/kv_norm/scale", "self_attn.kv_a_layernorm.weight", (latent,))
    up = (H, c.qk_nope_head_dim + c.v_head_dim)
    yield _single("attn/w_ukv", "self_attn.kv_b_proj.weight", up, (latent,))
    yield _single("attn/w_o", "self_attn.o_proj.weight", (d,), (H, c.v_head_dim))


def _swiglu(path: str, name: str, size: int, inner: int) -> Iterator[Entry]:
    yield _single(f"{path}/w_gate", f"{name}.gate_proj.weight", (inner,), (size,))
    yield _single(f"{path}/w_up", f"{name}.up_proj.weight", (inner,), (size,))
    yield _single(f"{path}/w_down", f"{name}.down_proj.weight", (size,), (inner,))


def _dense(c: ModelConfig) -> Iterator[Entry]:
    """The MLP of a dense block."""
    yield from _swiglu("mlp", "mlp", c.hidden_size, c.dense_ffn_size)


def _experts(c: ModelConfig) -> Iterator[Entry]:
    """Router, routed experts and shared expert of a MoE block."""
    d, E, f = c.hidden_size, c.num_experts, c.expert_ffn_size
    yield _single("moe/router/kernel", "mlp.gate.weight", (E,), (d,))
    if c.topk_method == "noaux_tc":
        bias = _single("moe/router/bias", "mlp.gate.e_score_correction_bias", (E,))
        yield dataclasses.replace(bias, tree=ROUTER_BIAS)
    for entry in _swiglu("moe", "mlp.experts.{}", d, f):
        names = [entry.names.item().format(expert) for expert in range(E)]
        yield dataclasses.replace(entry, names=np.array(names, object))
    if c.num_shared_experts:
        yield from _swiglu("moe/shared", "mlp.shared_experts", d, c.num_shared_experts * f)


def _single(
    path: str, name: str, out_dims: tuple[int, ...], in_dims: tuple[int, ...] | None = None
) -> Entry:
    return Entry(PARAMS, path, np.array(name, object), out_dims, in_dims)


def _stacked(path: str, layers: range, block: list[Entry]) -> Iterator[Entry]:
    """The entries of one block, repeated for `layers` along a new leading axis."""
    for entry in block:
        names = np.stack([f"model.layers.{layer}." + entry.names for layer in layers])
        yield dataclasses.replace(entry, path=f"{path}/{entry.path}", names=names)


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that released MTP layers repeat -> the main model's tensors they are copies of."""
    copies = {}
    if config.tie_embeddings:  # transformers leaves the copy out, some releases have it
        below = janus_names.LANGUAGE if isinstance(config, JanusConfig) else "model."
        copies["lm_head.weight"] = f"{below}embed_tokens.weight"
    for layer in range(config.num_layers, config.num_layers + config.mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies
