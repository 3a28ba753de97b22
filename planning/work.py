"""Seconds of a layer's passes on one device and micro batch, from its products and rows.

A pass is F (forward), I (gradient of the input, with what is recomputed for it) or W (gradient of
the weights; deferred, it sends the rows again). Counted are

- dense products by shape, in FP8 where the recipe says so,
- grouped products of the experts on the rows that they are given under even load,
- causal attention by length,
- what memory bounds: norms, sums, rotations, quantisation, sorting rows, weights read and cast,
  gradients added up in fp32,
- the expert exchange, and sums over `tensor`.

Letters: N tokens of a device and micro batch, d width, f inner width of an expert.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from planning.case import Case
from planning.hardware import EXCHANGE_CORES, Hardware

Pass = Literal["F", "I", "W"]
ROUTER_SPEED = 67 / 989
"""Share of the BF16 peak of fp32 products outside of tensor cores (NVIDIA data sheet H100: 67)."""


class Seconds(NamedTuple):
    """Seconds by kind of work."""

    products: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    exchange: float = 0.0
    """Of tokens with their experts."""
    tensor: float = 0.0
    """Sums over `tensor` and `context`."""

    def __add__(self, other):
        return Seconds(*map(sum, zip(self, other, strict=True)))

    def times(self, count: float) -> "Seconds":
        """All of it `count` times."""
        return Seconds(*(count * part for part in self))

    @property
    def compute(self) -> float:
        """Without what travels."""
        return self.products + self.experts + self.attention + self.memory

    @property
    def total(self) -> float:
        """All, one after the other."""
        return sum(self)


NOTHING = Seconds()


@dataclasses.dataclass(frozen=True)
class Passes:
    """A layer's, or what surrounds the layers."""

    F: Seconds
    I: Seconds  # noqa: E741
    W: Seconds

    @property
    def B(self) -> Seconds:
        """A full backward pass: the rows that a deferred W sends again are at hand."""
        return self.I + self.W._replace(exchange=0.0)

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.F + other.F, self.I + other.I, self.W + other.W)

    def times(self, count: float) -> "Passes":
        """So many of them."""
        return Passes(self.F.times(count), self.I.times(count), self.W.times(count))


EMPTY = Passes(NOTHING, NOTHING, NOTHING)


class _Work:
    """Adds up what one kind of layer does."""

    def __init__(self, case: Case):
        self.case, self.hardware = case, case.hardware
        self.N, self.fp8 = case.tokens, case.recipe.fp8
        self.item = case.recipe.activation_dtype.itemsize
        self.passes = {"F": NOTHING, "I": NOTHING, "W": NOTHING}
        self.remat = case.recipe.remat

    def add(self, where: str, **seconds: float) -> None:
        """Seconds to some passes, named by letters."""
        for letter in where:
            self.passes[letter] += Seconds(**seconds)

    def again(self, selective: bool) -> str:
        """Passes that a piece of the forward pass runs in; `selective`: whether selective
        recomputation repeats it."""
        repeats = self.remat == "full" or (self.remat == "selective" and selective)
        return "FI" if repeats else "F"

    def memory(self, where: str, size: float) -> None:
        """Bytes that memory moves."""
        self.add(where, memory=size / self.hardware.memory_speed)

    def product(self, K: int, N: int, recomputed: bool, fp8: bool | None = None) -> None:
        """A dense product [tokens, K] x [K, N] with both gradients, and its weights' passage."""
        fp8 = self.fp8 if fp8 is None else fp8
        M, flops = self.N, 2.0 * self.N * K * N
        speed = self.hardware.product
        self.add(self.again(recomputed), products=flops / speed(M, N, K, fp8))
        self.add("I", products=flops / speed(M, K, N, fp8))
        self.add("W", products=flops / speed(K, N, M, fp8))
        self.quantized(self.again(recomputed), M * K, fp8)
        self.quantized("I", M * N, fp8)
        self.quantized("W", M * (K + N), fp8)
        self.weights(K * N, fp8)

    def quantized(self, where: str, numbers: float, fp8: bool) -> None:
        """Reading numbers in BF16 and writing them in FP8."""
        if fp8:
            self.memory(where, numbers * (self.item + 1))

    def weights(self, count: float, fp8: bool) -> None:
        """Master weights cast for the products, forward and backward, and their gradient added to
        its sum in fp32: written, the sum read and written."""
        self.memory("FI", count * (4 + (1 if fp8 else self.item)))
        self.memory("W", count * 4 * 3)

    def done(self) -> Passes:
        """The passes."""
        return Passes(self.passes["F"], self.passes["I"], self.passes["W"])


def stack_layer(case: Case) -> Passes:
    """A layer of the stack that a pipeline cuts: with experts, where the model has any."""
    return moe_layer(case) if case.model.num_moe_layers else dense_layer(case)


def moe_layer(case: Case) -> Passes:
    """A layer with experts."""
    work = _Work(case)
    _attention(work)
    _router(work)
    _mlp(work, case.model.num_shared_experts * case.model.expert_ffn_size // case.mesh.tensor)
    _experts(work)
    _exchange(work)
    _over_tensor(work)
    return work.done()


def dense_layer(case: Case) -> Passes:
    """A layer with a dense MLP."""
    work = _Work(case)
    _attention(work)
    _mlp(work, case.model.dense_ffn_size // case.mesh.tensor)
    _over_tensor(work)
    return work.done()


def head(case: Case) -> Passes:
    """Head and loss: its forward pass makes both gradients."""
    work, model = _Work(case), case.model
    d, vocab = model.hidden_size, model.vocab_size // case.mesh.tensor
    # A pipeline runs it with the backward pass; so does any loop that needs no value before.
    for M, N, K in ((work.N, vocab, d), (work.N, d, vocab), (d, vocab, work.N)):
        flops = 2.0 * M * N * K
        work.add("I", products=flops / case.hardware.product(M, N, K, False))
    work.memory("I", d * vocab * (4 + work.item + 4 * 3))
    return work.done()


def embedding(case: Case) -> Passes:
    """Rows of the table, and their gradient added to the table's sum."""
    work, model = _Work(case), case.model
    rows = work.N * model.hidden_size * work.item
    table = model.vocab_size // case.mesh.tensor * model.hidden_size
    work.memory("F", 2 * rows + table * (4 + work.item))
    work.memory("W", 2 * rows + table * 4 * 3)
    return work.done()


def mtp_module(case: Case) -> Passes:
    """A multi-token-prediction module: its projection and a layer, embedding and head left out."""
    work, d = _Work(case), case.model.hidden_size
    work.product(2 * d, d, recomputed=True)
    return work.done() + moe_layer(case)


# ---- parts of a layer ---------------------------------------------------------------------------


def key_numbers(case: Case) -> int:
    """Numbers of a token from which a device makes keys and values: the latent and the key's
    rotary part, or all channels of its key heads."""
    model = case.model
    if model.attention == "grouped":
        heads, cut = model.num_kv_heads, case.mesh.tensor
        held = heads // cut if heads % cut == 0 else heads
        return held * (model.qk_head_dim + model.v_head_dim)
    return model.kv_lora_rank + model.qk_rope_head_dim


def _attention(work: _Work) -> None:
    model, case = work.case.model, work.case
    d, tokens, item = model.hidden_size, work.N, work.item
    heads = model.num_heads // case.mesh.tensor
    queries, values = heads * model.qk_head_dim, heads * model.v_head_dim
    if model.q_lora_rank is None:
        work.product(d, queries, recomputed=True)
    else:
        work.product(d, model.q_lora_rank, recomputed=False)
        work.product(model.q_lora_rank, queries, recomputed=True)
    if model.attention == "grouped":
        expanded = key_numbers(case)
        work.product(d, expanded, recomputed=True)
    else:
        work.product(d, key_numbers(case), recomputed=False)
        expanded = heads * (model.qk_nope_head_dim + model.v_head_dim)
        work.product(model.kv_lora_rank, expanded, recomputed=True)
    work.product(values, d, recomputed=False)
    # Causal: half of the square. Backward are five products of the forward pass's two.
    flops = 2.0 * tokens * case.train.seq_len * heads * (model.qk_head_dim + model.v_head_dim) / 2
    speed = case.hardware.attention
    work.add(work.again(False), attention=flops / speed(case.train.seq_len, False))
    work.add("I", attention=2.5 * flops / speed(case.train.seq_len, True))
    # Norm, sum with the residual stream, rotation of the queries: read and written.
    work.memory(work.again(True), tokens * item * (2 * d + 2 * queries))
    work.memory("F", tokens * item * 3 * d)
    work.memory("I", tokens * item * (4 * d + 2 * queries + 2 * expanded))


def _router(work: _Work) -> None:
    model, tokens = work.case.model, work.N
    flops = 2.0 * tokens * model.hidden_size * model.num_experts
    speed = work.case.hardware.gpu.bf16 * ROUTER_SPEED
    work.add(work.again(True), products=flops / speed)
    work.add("IW", products=flops / speed)
    # Logits, scores, selection and balance: some ten arrays [N, E] in fp32.
    work.memory(work.again(True), tokens * 4 * (10 * model.num_experts + model.hidden_size))
    work.memory("I", tokens * 4 * (5 * model.num_experts + model.hidden_size))


def _mlp(work: _Work, inner: int) -> None:
    """SwiGLU of a dense layer or of the shared experts, with its norm and sum."""
    d, tokens, item = work.case.model.hidden_size, work.N, work.item
    if inner:
        work.product(d, 2 * inner, recomputed=True)
        work.product(inner, d, recomputed=False)
        work.memory(work.again(True), tokens * item * 3 * inner)
        work.memory("I", tokens * item * 5 * inner)
    work.memory(work.again(True), tokens * item * 2 * d)
    work.memory("F", tokens * item * 4 * d)
    work.memory("I", tokens * item * 5 * d)


def _experts(work: _Work) -> None:
    case, model, rows = work.case, work.case.model, work.case.exchange
    d, f, item = model.hidden_size, model.expert_ffn_size // case.mesh.tensor, work.item
    local = model.num_experts // case.mesh.expert
    M, each = rows.computed, rows.computed / local
    speed, fp8 = case.hardware.grouped, work.fp8
    if case.ways.grouped and not fp8:
        speed = lambda *_, **__: case.hardware.gpu.bf16 * case.ways.grouped  # noqa: E731
    for K, N, recomputed in ((d, 2 * f, case.ways.recomputes_experts), (f, d, False)):
        flops = 2.0 * M * K * N
        work.add(work.again(recomputed), experts=flops / speed(each, N, K, fp8))
        work.add("I", experts=flops / speed(each, K, N, fp8))
        work.add("W", experts=flops / speed(each, N, K, fp8, weights=True))
        work.quantized(work.again(recomputed), M * K, fp8)
        work.quantized("I", M * N, fp8)
        work.quantized("W", M * (K + N), fp8)
    work.weights(local * 3 * d * f, fp8)
    # Rows gathered into the order of experts; SwiGLU; weighted sums. Backward the same way.
    work.memory(work.again(True), M * item * (2 * d + 3 * f))
    work.memory("F", M * item * d + work.N * item * d)
    work.memory("I", M * item * (3 * d + 5 * f))


def wire_bytes(case: Case, back: bool) -> float:
    """Bytes of a row on its way to experts, or back."""
    d, item = case.model.hidden_size, case.recipe.activation_dtype.itemsize
    if back or not case.mesh.exchange_dtype:
        return d * item
    return d + 4 * math.ceil(d / 128)


def exchange_ways(case: Case) -> dict[str, tuple[int, int]]:
    """Times that rows go to experts and come back, by pass."""
    again = case.recipe.remat != "none" and case.ways.resends
    back_again = case.recipe.remat == "full"
    return {
        "F": (1, 1),
        "I": (1 + again, 1 + back_again),
        "W": (2, 0) if case.ways.resends else (0, 0),
    }


def exchange_levels(case: Case) -> list[tuple[str, float, float]]:
    """Axis, rows sent one way, and bytes a second, of each level of the exchange."""
    rows, mesh, hardware = case.exchange, case.mesh, case.hardware
    exact = mesh.exchange == "ragged" or case.ways.exact_rows
    per_node = mesh.expert // mesh.expert_nodes
    inner = mesh.context * mesh.tensor
    levels = []
    if mesh.expert_nodes > 1:
        sent = rows.mean_across if exact else rows.across
        link = hardware.link(mesh.expert * inner)
        levels.append(("expert_nodes", sent, hardware.exchange(link, mesh.expert)))
        if case.ways.one_hop:  # DeepEP's figures between nodes hold both
            return levels
    if per_node > 1:
        sent = rows.mean_inside if exact else rows.inside
        link = hardware.link(per_node * inner)
        levels.append(("expert", sent, hardware.exchange(link, mesh.expert)))
    return levels


def _exchange(work: _Work) -> None:
    case = work.case
    for _, rows, speed in exchange_levels(case):
        for where, (there, back) in exchange_ways(case).items():
            size = rows * (there * wire_bytes(case, False) + back * wire_bytes(case, True))
            work.add(where, exchange=size / speed)
    # Send buffers are written and read on both sides.
    sent = sum(rows for _, rows, _ in exchange_levels(case))
    size = 2 * sent * case.model.hidden_size * work.item
    work.memory("F", 2 * size)
    work.memory("I", 3 * size)


def _over_tensor(work: _Work) -> None:
    """Sums of the attention's and the MLP's outputs, forward, and of their inputs, backward; keys
    and values of other shards of the sequence."""
    case, mesh = work.case, work.case.mesh
    hardware, model = case.hardware, case.model
    if mesh.tensor > 1:
        size = 2 * work.N * model.hidden_size * work.item * 2 * (mesh.tensor - 1) / mesh.tensor
        seconds = size / hardware.collective(hardware.link(mesh.tensor))
        work.add(work.again(True), tensor=seconds)
        work.add("I", tensor=seconds)
    if mesh.context > 1:
        size = (mesh.context - 1) * work.N * key_numbers(case) * work.item
        speed = hardware.collective(hardware.link(mesh.context * mesh.tensor))
        work.add(work.again(False), tensor=size / speed)
        work.add("I", tensor=3 * size / speed)


def paired(forward: Seconds, backward: Seconds, hardware: Hardware, travels: bool) -> float:
    """Seconds of a forward and a backward pass of different micro batches side by side: products
    of one while the other's rows travel, on the processors that are left."""
    both = forward + backward
    compute = both.compute + both.tensor
    if travels and both.exchange:
        compute /= 1 - EXCHANGE_CORES.value * min(1.0, both.exchange / compute)
    return max(compute, both.exchange)
