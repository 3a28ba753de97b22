"""Names of a Hugging Face DeepSeek checkpoint and places in our parameter tree, both ways.

One table (`table`) states, for each array of ours, the tensors it is made of and their layout; both
directions walk it. Three facts cover all layouts:
  - a checkpoint stores a matrix as [out, in], we store [in..., out...], heads on their own axes.
    Per head, q_b rows are [nope | rope] and kv_b rows [k_nope | v], as in our head_dim axes;
  - we stack equal layers and experts along leading axes, a checkpoint has one tensor for each;
  - MTP module k is the checkpoint's layer `num_hidden_layers + k`.

Pure numpy. A state is a mapping from tensor name to array and is read once per tensor, so it may
load lazily. Strict both ways: what is missing, left over or of another shape is an error.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from model.config import ModelConfig

Tree = dict[str, Any]
State = Mapping[str, np.ndarray]

PARAMS, ROUTER_BIAS = "params", "router_bias"

_FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")
# Old exports store the rotary frequencies, which the configuration determines.
DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of ours: the grid of tensors stacked in it, and how each of them is laid out."""

    tree: str
    """PARAMS or ROUTER_BIAS."""
    path: str
    """Place in that tree, keys joined by '/'."""
    names: np.ndarray
    """Tensor names, an array of strings whose shape is the array's leading (stacked) axes."""
    out_dims: tuple[int, ...]
    """Factors of the tensor's first axis."""
    in_dims: tuple[int, ...] | None
    """Factors of its second axis; None: used as stored, with shape out_dims."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in a checkpoint."""
        if self.in_dims is None:
            return self.out_dims
        return math.prod(self.out_dims), math.prod(self.in_dims)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our array."""
        return (*self.names.shape, *(self.in_dims or ()), *self.out_dims)

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor in our layout."""
        if self.in_dims is None:
            return tensor
        return np.ascontiguousarray(tensor.T).reshape(*self.in_dims, *self.out_dims)

    def store(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `load`."""
        if self.in_dims is None:
            return array
        return np.ascontiguousarray(array.reshape(self.stored_shape[::-1]).T)


def from_hf(
    state: State, config: ModelConfig, trees: Iterable[str] = (PARAMS, ROUTER_BIAS)
) -> Tree:
    """{"params": ..., "router_bias": ...} in fp32 from a checkpoint's tensors.

    `trees` limits what is expected: gradients have no router bias. Experts may be one tensor each
    or fused (`experts.gate_up_proj`, `experts.down_proj`), as transformers 5 holds them in memory.

    Raises ValueError naming tensors that are missing, unknown, or of another shape than `config`
    says, and MTP copies of the embedding or head that differ from the main model's.
    """
    entries = [entry for entry in table(config) if entry.tree in trees]
    copies = shared_copies(config)
    state = split_fused_experts(state)
    expected = {name for entry in entries for name in entry.names.flat}
    _require_none(expected - state.keys(), "tensors are missing from the checkpoint")
    extra = {
        name for name in state.keys() - expected - copies.keys() if not DERIVED.fullmatch(name)
    }
    _require_none(extra, "tensors of the checkpoint have no place in this configuration")
    result: Tree = {tree: {} for tree in trees}
    for entry in entries:
        array = np.empty(entry.our_shape, np.float32)
        for index in np.ndindex(entry.names.shape):
            name = str(entry.names[index])
            tensor = np.asarray(state[name])
            _require_shape(name, tensor.shape, entry.stored_shape)
            array[index] = entry.load(tensor)
        _insert(result[entry.tree], entry.path, array)
    for copy, original in copies.items():
        if copy in state and not np.array_equal(state[copy], state[original]):
            raise ValueError(
                f"{copy} differs from {original}; MTP modules share embedding and head with the "
                "main model, so the two must be equal"
            )
    return result


def to_hf(
    trees: Tree, config: ModelConfig, *, mtp_copies: bool = True, fuse: bool = False
) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: fp32 tensors from {"params": ..., "router_bias": ...}.

    `mtp_copies` repeats embedding and head in every MTP layer, as released checkpoints do; `fuse`
    writes the experts of a layer as two tensors instead of three per expert.

    Raises ValueError naming arrays of ours that are missing, unknown or of another shape.
    """
    entries = [entry for entry in table(config) if entry.tree in trees]
    ours = {f"{tree}/{path}": a for tree, sub in trees.items() for path, a in _walk(sub)}
    expected = {f"{entry.tree}/{entry.path}" for entry in entries}
    _require_none(expected - ours.keys(), "arrays are missing from the parameter tree")
    _require_none(ours.keys() - expected, "arrays of the parameter tree are not in a checkpoint")
    state = {}
    for entry in entries:
        array = np.asarray(ours[f"{entry.tree}/{entry.path}"], np.float32)
        _require_shape(entry.path, array.shape, entry.our_shape)
        for index in np.ndindex(entry.names.shape):
            state[entry.names[index]] = entry.store(array[index])
    if mtp_copies:
        state |= {copy: state[original] for copy, original in shared_copies(config).items()}
    return fuse_experts(state) if fuse else state


def table(config: ModelConfig) -> list[Entry]:
    """Every array of ours with the checkpoint tensors it holds."""
    c, d = config, config.hidden_size
    k, L, D = c.num_dense_layers, c.num_layers, c.mtp_depth
    entries = [
        _single("embed/table", "model.embed_tokens.weight", (c.vocab_size, d)),
        _single("final_norm/scale", "model.norm.weight", (d,)),
        _single("head/kernel", "lm_head.weight", (c.vocab_size,), (d,)),
    ]
    if k:
        entries += _stacked("dense_layers", range(k), [*_attention(c), *_dense(c)])
    if k < L:
        entries += _stacked("moe_layers", range(k, L), [*_attention(c), *_experts(c)])
    if D:
        block = [
            dataclasses.replace(entry, path=f"block/{entry.path}")
            for entry in [*_attention(c), *_experts(c)]
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


def _attention(c: ModelConfig) -> Iterator[Entry]:
    """Latent attention and the two norms of a block."""
    d, H, latent = c.hidden_size, c.num_heads, c.kv_lora_rank
    yield _single("attn_norm/scale", "input_layernorm.weight", (d,))
    yield _single("ffn_norm/scale", "post_attention_layernorm.weight", (d,))
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
    for layer in range(config.num_layers, config.num_layers + config.mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def split_fused_experts(state: State) -> dict[str, np.ndarray] | State:
    """One tensor per expert from `gate_up_proj` [E, 2f, d] (gate first) and `down_proj` [E, d, f].

    Views, no copies. A state without fused tensors is returned as it is.
    """
    fused = {name: match for name in state if (match := _FUSED.fullmatch(name))}
    if not fused:
        return state
    result = {name: state[name] for name in state if name not in fused}
    for name, match in fused.items():
        prefix, kind = match.groups()
        for expert, matrix in enumerate(state[name]):
            parts = {"down_proj": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True))
            result |= {f"{prefix}{expert}.{part}.weight": value for part, value in parts.items()}
    return result


def fuse_experts(state: State) -> dict[str, np.ndarray]:
    """The inverse of `split_fused_experts`."""
    pattern = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.gate_proj\.weight")
    experts: dict[str, int] = {}
    for name in state:
        if match := pattern.fullmatch(name):
            experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)
    result = dict(state)
    for prefix, count in experts.items():
        gate, up, down = (
            np.stack([result.pop(f"{prefix}{e}.{part}.weight") for e in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        result[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        result[f"{prefix}down_proj"] = down
    return result


def _insert(tree: Tree, path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _walk(tree: Tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _require_none(names: Iterable[str], problem: str) -> None:
    if ordered := sorted(names):
        shown = ", ".join(ordered[:8]) + (", ..." if len(ordered) > 8 else "")
        raise ValueError(
            f"{len(ordered)} {problem}: {shown}; "
            "check that the configuration belongs to these weights"
        )


def _require_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(found)}, the configuration says {wanted}; "
            "check that the configuration belongs to these weights"
        )
