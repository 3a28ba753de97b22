"""The expert exchange, in every way and cut: what one device computes, and what travels.

Regions of a MoE layer alone, on 8 emulated devices. Letters: B batch, T sequence, K choices per
token, D width, E experts, R rows of a device, S shards, J copies of a row.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from model.moe import MoE
from model.recipe import Recipe
from model.router import select
from sharding import mesh as mesh_module
from sharding.config import MeshConfig
from sharding.experts import exchange
from sharding.experts.exchange import assign_slots, collect, level, route, spread
from sharding.experts.quantize import dequantize, quantize
from sharding.experts.room import even_share, room
from sharding.experts.rounds import Count
from sharding.mesh import axis_sizes, make_layout, make_mesh
from sharding.partition import (
    Layout,
    along_axes,
    gather,
    num_shards,
    on_shards,
    shard_index,
    use_layout,
    vary,
)
from tests.layout_helpers import MODEL, ONE_DEVICE, assert_same_gradients, layout_of

B, T, K, D, E = 8, 64, 3, 16, 32
CONFIG = dataclasses.replace(
    MODEL, hidden_size=D, num_experts=E, experts_per_token=K, expert_ffn_size=8,
    num_expert_groups=1, groups_per_token=1, num_shared_experts=0,
)  # fmt: skip
FP8 = "float8_e4m3fn"
FP32 = Recipe()


@functools.cache
def inputs():
    """Tokens, router weights and a cotangent; the layer's definition and expert weights."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
    weights = rng.uniform(0.2, 1, (B, T, K)).astype(np.float32)
    definition, params = nnx.split(MoE(CONFIG, nnx.Rngs(0)))
    return definition, jax.device_get(params), x, weights, dy


def choices(num_experts: int) -> np.ndarray:
    """Distinct experts per token, all among the first `num_experts` [B, T, K]."""
    rng = np.random.default_rng(1)
    return rng.permuted(np.tile(np.arange(num_experts), (B, T, 1)), axis=-1)[..., :K].astype("i4")


ROUTINGS = {
    "even": choices(E),
    "all to one shard": choices(E // 8),
    "few": choices(E // 2),
    "all to the same": np.broadcast_to(np.arange(K, dtype="i4"), (B, T, K)),
}


def program(layout: Layout, recipe: Recipe = FP32):
    """Jitted (params, x, weights, ids, dy) to output, how it came about, and gradients."""
    definition = inputs()[0]

    def run(params, x, weights, ids, dy):
        with use_layout(layout):

            def forward(params, x, weights):
                moe = nnx.merge(definition, params)
                return moe.routed(x.astype(recipe.activation_dtype), ids, weights, recipe)

            y, vjp, served = jax.vjp(forward, params, x, weights, has_aux=True)
            return y, served, vjp(dy.astype(y.dtype))

    return jax.jit(run)


FURTHER: dict[tuple[MeshConfig, str], int] = {}
"""Further rounds of every run."""


@functools.cache
def compiled(config: MeshConfig, recipe: Recipe = FP32):
    return program(layout_of(config), recipe)


def results(config: MeshConfig, routing: str, recipe: Recipe = FP32) -> dict:
    _, params, x, weights, dy = inputs()
    y, served, (dparams, dx, dweights) = compiled(config, recipe)(
        params, x, weights, ROUTINGS[routing], dy
    )
    assert float(served.dropped) == 0
    FURTHER[config, routing] = int(served.further)
    experts = {name: dparams[name].get_value() for name in ("w_gate", "w_up", "w_down")}
    return {"y": y, "x": dx, "weights": dweights, **experts}


def check_same(config: MeshConfig, *routings: str) -> None:
    for routing in routings or ROUTINGS:
        assert_same_gradients(results(config, routing), results(ONE_DEVICE, routing))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


WAYS = {
    "2 nodes x 4, capacity 1": MeshConfig(expert=8, expert_nodes=2, exchange_capacity=1.0),
}
SLOW_WAYS = {
    "4 x tensor 2": MeshConfig(expert=4, tensor=2),
    "8, capacity 1.25": MeshConfig(expert=8, exchange_capacity=1.25),
    "2": MeshConfig(expert=2),
    "8": MeshConfig(expert=8),
    "8, room for all": MeshConfig(expert=8, exchange_capacity=math.inf),
    "data 2 x 4": MeshConfig(data=2, expert=4, exchange_capacity=1.0),
    "2 nodes x 4": MeshConfig(expert=8, expert_nodes=2),
    "4 nodes x 2": MeshConfig(expert=8, expert_nodes=4),
    "context 2 x 4": MeshConfig(context=2, expert=4),
    "4 nodes x 2, capacity 1.25": MeshConfig(expert=8, expert_nodes=4, exchange_capacity=1.25),
    "2 nodes x 2 x tensor 2": MeshConfig(expert=4, expert_nodes=2, tensor=2, exchange_capacity=1.0),
    "gather 8": MeshConfig(expert=8, exchange="gather"),
    "gather, 2 nodes x 2 x tensor 2": MeshConfig(
        expert=4, expert_nodes=2, tensor=2, exchange="gather"
    ),
}


@pytest.mark.parametrize(
    "config", [*WAYS.values(), *map(slow, SLOW_WAYS.values())], ids=[*WAYS, *SLOW_WAYS]
)
def test_output_and_gradients_are_one_devices(config):
    """Of tokens, router weights and all expert weights; nothing dropped, however uneven."""
    check_same(config)


@pytest.mark.slow
def test_inside_a_region_over_another_axis():
    """As in the pipeline, where an outer region cuts another axis and tracks no variation."""
    layout = layout_of(MeshConfig(pipe=2, expert=4, expert_nodes=2, exchange_capacity=1.0))
    definition, params, x, weights, dy = inputs()
    ids = ROUTINGS["all to one shard"]

    def staged(params, x, weights, ids, dy):
        def forward(params, x, weights):
            return nnx.merge(definition, params).routed(x, ids, weights, FP32)

        y, vjp, served = jax.vjp(forward, params, x, weights, has_aux=True)
        dparams, dx, dweights = vjp(dy)
        return y, served, dparams, dx, dweights

    with use_layout(layout):
        run = jax.jit(along_axes(staged, ("pipe",), P(), P()))
        y, served, dparams, dx, dweights = run(params, x, weights, ids, dy)
    assert float(served.dropped) == 0 < float(served.further)
    experts = {name: dparams[name].get_value() for name in ("w_gate", "w_up", "w_down")}
    got = {"y": y, "x": dx, "weights": dweights, **experts}
    assert_same_gradients(got, results(ONE_DEVICE, "all to one shard"))


# What travels


def passed_on(config: MeshConfig, ids_RK: np.ndarray):
    """Shards of one level that received each token, and rounds that every device ran.

    `ids_RK` are the choices of all devices, one device after the other.
    """
    axis = "nodes" if config.expert_nodes > 1 else "experts_of_node"
    layout = layout_of(config)

    def count(params, x_RD, ids_RK, weights_RK):
        """One for each row that arrives, provided that all its experts are of this shard."""
        mine_RK = ids_RK // (E // num_shards(axis)) == shard_index(axis)
        arrived_R = jnp.any(ids_RK >= 0, axis=1) & jnp.all(mine_RK | (ids_RK < 0), axis=1)
        arrived_RD = jnp.broadcast_to(arrived_R[:, None], x_RD.shape).astype(x_RD.dtype)
        return arrived_RD, Count(vary(1), vary(0))

    def region(x, ids, weights):
        held = E // num_shards(axis)
        mean = len(ids) * even_share(E, held, K, (1, 1))
        rows = room(mean, len(ids), config.exchange_capacity, 0)
        y, counted = level(axis, "experts", held, rows, layout.config, count)((), x, ids, weights)
        return y, jnp.reshape(vary(counted.further), 1) + 1

    names = ("batch", None)
    ones = np.ones(ids_RK.shape, np.float32)
    with use_layout(layout):
        run = jax.jit(on_shards(region, (names, names, names), (names, ("batch",))))
        y, rounds = run(ones, ids_RK, ones)
    return np.asarray(y)[:, 0], np.asarray(rounds)


def test_a_level_of_one_shard_is_its_inner_function():
    """One device pays nothing for the exchange."""

    def inner(*_):
        raise AssertionError

    assert level("experts_of_node", "experts_of_node", E, 4, MeshConfig(), inner) is inner


def test_a_token_crosses_to_a_node_once():
    """However many of its experts are there; node-limited routing bounds the nodes."""
    config = dataclasses.replace(CONFIG, num_expert_groups=8, groups_per_token=2)
    scores = np.random.default_rng(2).uniform(size=(B, T, E)).astype(np.float32)
    ids = np.asarray(select(jnp.asarray(scores), None, config)[0]).reshape(B * T, K)
    received, _ = passed_on(MeshConfig(expert=8, expert_nodes=4), ids)
    np.testing.assert_array_equal(received, [len(set(row // (E // 4))) for row in ids])
    assert (received.min(), received.max()) == (1, config.groups_per_token)


@pytest.mark.parametrize(("routing", "rounds"), [("even", 1), ("all to one shard", 2)])
def test_what_does_not_fit_goes_in_further_rounds(routing, rounds):
    """A shard needs 21.7 of a device's 64 rows on average: capacity 1.5 makes 40 slots."""
    ids = ROUTINGS[routing].reshape(B * T, K)
    received, ran = passed_on(MeshConfig(expert=8, exchange_capacity=1.5), ids)
    np.testing.assert_array_equal(received, [len(set(row // (E // 8))) for row in ids])
    np.testing.assert_array_equal(ran, np.full(8, rounds))


@pytest.mark.parametrize("experts", [2, 4, 8, 16])
@pytest.mark.parametrize("groups", [(1, 1), (8, 2), (4, 3)])
def test_even_share_against_draws(experts, groups):
    """Mean share of tokens that need a shard: parts of a group and several groups."""
    count, chosen = groups
    rng = np.random.default_rng(5)
    pools = np.sort(rng.random((4000, count)).argsort(1)[:, :chosen], axis=1)
    pool = (pools[:, :, None] * (E // count) + np.arange(E // count)).reshape(len(pools), -1)
    ids = rng.permuted(pool, axis=1)[:, :K]
    drawn = np.mean([(ids // experts == s).any(1).mean() for s in range(E // experts)])
    np.testing.assert_allclose(even_share(E, experts, K, groups), drawn, atol=0.01)


@pytest.mark.parametrize("num_shards", [2, 8])
def test_plan_against_numpy(num_shards):
    """Copies, turns, slots and both movements; shards fewer and more than the choices."""
    rng = np.random.default_rng(3)
    R, C = 11, 4
    shard_RK = rng.integers(-1, num_shards, (R, K)).astype(np.int32)
    x_RD, y_PD = (
        jnp.asarray(rng.standard_normal((n, D)), jnp.float32) for n in (R, num_shards * C)
    )
    waiting = [[r for r in range(R) if s in shard_RK[r]] for s in range(num_shards)]
    routing = route(jnp.asarray(shard_RK), num_shards)
    np.testing.assert_array_equal(routing.counts_S, [len(rows) for rows in waiting])
    start_S = jnp.arange(num_shards, dtype=jnp.int32) * C
    sent = 0
    for i in range(math.ceil(max(map(len, waiting)) / C)):
        slots = assign_slots(routing, i * C, C, start_S, num_shards * C)
        buffer, total = np.zeros(y_PD.shape, "f4"), np.zeros(x_RD.shape, "f4")
        for s, rows in enumerate(waiting):
            for c, r in enumerate(rows[i * C : (i + 1) * C]):
                buffer[s * C + c] = x_RD[r]
                total[r] += y_PD[s * C + c]
                sent += 1
        filled, spread_vjp = jax.vjp(functools.partial(spread, slots=slots), x_RD)
        summed, collect_vjp = jax.vjp(functools.partial(collect, slots=slots), y_PD)
        for got in (filled, *collect_vjp(x_RD)):
            np.testing.assert_array_equal(got, buffer)
        for got in (summed, *spread_vjp(y_PD)):
            np.testing.assert_allclose(got, total, rtol=1e-6, atol=1e-6)
    assert sent == sum(map(len, waiting))


def lowered(config: MeshConfig, **kwargs) -> str:
    """StableHLO of output and gradients."""
    _, params, x, weights, dy = inputs()
    count = math.prod(axis_sizes(config).values())
    layout = Layout(make_mesh(config, jax.devices()[:count]), config=config)
    return program(layout).trace(params, x, weights, ROUTINGS["even"], dy).lower(**kwargs).as_text()


def test_rows_are_never_scattered():
    """Scatters are slow and, on GPUs, unordered: only numbers of rows may be scattered."""
    text = lowered(MeshConfig(expert=8, expert_nodes=2))
    scattered = re.findall(r'"stablehlo.scatter"\(.*?\}\) : \(tensor<(.*?)>', text, re.DOTALL)
    assert len(scattered) >= 3  # two levels and the sort, once per copy of a round
    assert all(re.fullmatch(r"\d+xi32", kind) for kind in scattered), scattered


# FP8


def test_fp8_rows_are_close_and_scales_powers_of_two():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((5, 200)).astype(np.float32) * np.exp(rng.uniform(-5, 5, (5, 1)))
    x = x.astype(np.float32)
    x[0] = 0
    q, scale = quantize(jnp.asarray(x), FP8)
    assert (q.dtype, q.shape, scale.shape) == (jnp.float8_e4m3fn, (5, 200), (5, 2))
    assert (np.frexp(np.asarray(scale))[0] == 0.5).all()
    tiles = np.pad(np.abs(x), ((0, 0), (0, 56))).reshape(5, 2, 128).max(-1)
    np.testing.assert_array_equal(scale, 2.0 ** np.ceil(np.log2(np.maximum(tiles, 1e-4) / 448)))
    back = dequantize(q, scale, jnp.float32)
    # Three bits of mantissa, and below 2^-6 of the scale steps of 2^-9.
    bound = np.maximum(np.abs(x) / 16, np.repeat(np.asarray(scale), 128, 1)[:, :200] * 2**-10)
    assert (np.abs(back - x) <= bound).all()
    again = dequantize(*quantize(back, FP8), jnp.float32)
    np.testing.assert_array_equal(again, back)  # so that a second level adds no error


def test_fp8_hides_no_overflow():
    for bad in (np.inf, np.nan):
        q, scale = quantize(jnp.array([[1.0, bad]]), FP8)
        assert np.isnan(dequantize(q, scale, jnp.float32)).all()


EIGHT_BITS = MeshConfig(expert=4, exchange_dtype=FP8)


def test_fp8_exchange_is_close():
    """Norm of the error against that of the fp32 exchange. One rounding costs about 0.027; the
    gradients of the expert weights meet two, of tokens and of cotangents."""
    got, want = results(EIGHT_BITS, "even"), results(ONE_DEVICE, "even")
    errors = {name: np.linalg.norm(got[name] - want[name]) for name in want}
    errors = {name: errors[name] / np.linalg.norm(want[name]) for name in want}
    assert 1e-3 < errors["y"] < 0.05
    assert max(errors.values()) < 0.08, errors


def test_only_dispatch_travels_in_fp8():
    """Tokens to the experts, and their output's gradient, which takes the same way."""
    calls = re.findall(r'"stablehlo.all_to_all".*?: \(tensor<(\S+)>\)', lowered(EIGHT_BITS))
    rows = [kind.rsplit("x", 1)[1] for kind in calls if f"x{D}x" in f"x{kind}"]
    assert sorted(rows) == ["f32", "f32", "f8E4M3FN", "f8E4M3FN"]


# Ragged


RAGGED = MeshConfig(expert=4, exchange="ragged")


def emulated(x, out, name, start, size, far_start, far_size):
    """A ragged all-to-all by gathering everything; checks the sizes announced."""
    S, me = num_shards(name), shard_index(name)
    x, start, size, far_start = (gather(a[None], name) for a in (x, start, size, far_start))
    index = jnp.arange(len(out))
    for s in range(S):
        row = index - far_start[s, me]
        here = (row >= 0) & (row < size[s, me]) & (size[s, me] == far_size[s])
        rows = x[s][jnp.clip(row + start[s, me], 0, x.shape[1] - 1)]
        out = jnp.where(here.reshape(-1, *(1,) * (x.ndim - 2)), rows, out)
    return out


@pytest.mark.parametrize(
    "config",
    [
        slow(MeshConfig(expert=4, expert_nodes=2, exchange="ragged", exchange_capacity=1.0)),
        RAGGED,
        slow(MeshConfig(expert=8, exchange="ragged", exchange_capacity=1.25)),
        slow(MeshConfig(expert=8, expert_nodes=2, exchange="ragged")),
    ],
    ids=["2 nodes x 2, capacity 1", "4", "8, capacity 1.25", "2 nodes x 4"],
)
def test_ragged_exchange_is_one_devices(config, monkeypatch):
    """Indices and gradients, over a portable stand-in for the primitive."""
    monkeypatch.setattr(exchange, "_ragged_all_to_all", emulated)
    monkeypatch.setattr(mesh_module, "_check_platform", lambda *_: None)
    check_same(config)


def test_ragged_exchange_lowers_for_gpus():
    text = lowered(RAGGED, lowering_platforms=("cuda",))
    assert len(re.findall(r"@ragged_all_to_all\(.*tensor<\d+x16xf32>", text)) == 4


def test_ragged_exchange_is_refused_on_cpu():
    with pytest.raises(ValueError, match="exchange=ragged needs GPUs"):
        make_layout(RAGGED, jax.devices()[:4])
    make_layout(MeshConfig(exchange="ragged"), jax.devices()[:1])
