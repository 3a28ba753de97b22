"""Logits of given tokens, in the form that another implementation can be compared with.

Letters: B sequences, T tokens, D hidden width, V vocabulary.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from model.blueprint import Tree, bind
from model.config import ModelConfig
from model.recipe import Recipe
from model.transformer import Tokens
from sharding.context import whole_sequences
from sharding.partition import Layout, batch_sharding, batch_shards, use_layout


class Scorer:
    """Teacher-forced forward passes over a layout, some rows at a time."""

    def __init__(self, config: ModelConfig, recipe: Recipe, layout: Layout, mtp: bool):
        if mtp and not config.mtp_depth:
            raise ValueError("the model has no MTP module; score it without --mtp")
        self._config, self._recipe, self._mtp = config, recipe, mtp
        self._layout = whole_sequences(layout)
        self.rows = batch_shards(layout)
        """Sequences of one pass."""

    def logits(self, weights: Tree, ids_BT: np.ndarray, beside: Any = None) -> list[np.ndarray]:
        """Main head's logits [B, T, V], then those of each MTP module if asked for; fp32.

        beside: what else the model reads (`Tokens.beside`), a tree of arrays [B, ..].

        At most `rows` sequences. Module k at position i has seen token i + k and predicts token
        i + k + 1; positions without a token k ahead hold NaN. FloatingPointError for other logits
        that are not finite.
        """

        def place(rows: np.ndarray) -> jax.Array:
            padded = np.zeros((self.rows, *rows.shape[1:]), rows.dtype)
            padded[: len(rows)] = rows
            names = ("batch", "seq") if rows.ndim == 2 else ("batch", *(None,) * (rows.ndim - 1))
            return jax.device_put(padded, batch_sharding(self._layout, names))

        placed = jax.tree.map(place, (ids_BT.astype(np.int32), beside))
        results = self._run(weights["params"], weights["router_bias"], *placed)
        heads = [whole(logits_BTV)[: len(ids_BT)] for logits_BTV in results]
        for depth, head in enumerate(heads):
            if not np.isfinite(head[:, : head.shape[1] - depth]).all():
                name = f"MTP module {depth}" if depth else "the model"
                raise FloatingPointError(
                    f"the logits of {name} are not all finite numbers; its weights are damaged, or "
                    "too large for --dtype"
                )
        for depth, head in enumerate(heads[1:], 1):
            head[:, max(0, head.shape[1] - depth) :] = np.nan
        return heads

    @functools.cached_property
    def _run(self):
        # Left in parts: whole logits on every device would be as many copies of the largest array.
        parts = batch_sharding(self._layout, ("batch", "seq", "vocab"))
        return jax.jit(self._forward, out_shardings=parts)

    def _forward(
        self, params: Tree, router_bias: Tree, ids_BT: jax.Array, beside: Any
    ) -> list[jax.Array]:
        with use_layout(self._layout):
            model = bind(self._config, params, router_bias)
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
            # What enters at the end reaches only positions that `logits` marks as NaN.
            next_ids_BT = jnp.roll(ids_BT, -1, axis=1) if self._mtp else None
            tokens = Tokens(ids_BT, positions_BT, None, beside)
            output = model(tokens, self._recipe, next_ids_BT)
            kernel_DV = model.head_kernel()
            return [
                jnp.einsum("BTD,DV->BTV", hidden_BTD.astype(jnp.float32), kernel_DV)
                for hidden_BTD in (output.hidden_BTD, *output.mtp_hidden)
            ]


def whole(x: jax.Array) -> np.ndarray:
    """An array of any placement in main memory, on every process, as a copy of one's own."""
    if x.is_fully_addressable:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


def nats(logits_BTV: np.ndarray, ids_BT: np.ndarray, ahead: int = 1) -> float:
    """Sum of -log p of the token `ahead` of each position that has one, in float64."""
    total = 0.0
    for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
        logits_TV = logits_TV[: max(0, len(ids_T) - ahead)].astype(np.float64)
        largest_T1 = logits_TV.max(-1, keepdims=True)
        log_sum_T = np.log(np.exp(logits_TV - largest_T1).sum(-1)) + largest_T1[:, 0]
        total += float((log_sum_T - logits_TV[np.arange(len(logits_TV)), ids_T[ahead:]]).sum())
    return total


def check_ids(ids_BT: np.ndarray, config: ModelConfig, what: str) -> np.ndarray:
    """The same as int32 [B, T]; ValueError, naming `what`, unless the model can read them."""
    if ids_BT.ndim != 2 or ids_BT.dtype.kind not in "iu" or not ids_BT.size:
        raise ValueError(f"{what} holds {ids_BT.dtype} {list(ids_BT.shape)}; give int32 [B, T]")
    low, high = int(ids_BT.min()), int(ids_BT.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"{what} holds token {low if low < 0 else high}; the vocabulary has ids "
            f"0..{config.vocab_size - 1}"
        )
    if ids_BT.shape[1] > config.max_position:
        raise ValueError(
            f"{what} has sequences of {ids_BT.shape[1]} tokens; the model's max_position is "
            f"{config.max_position}. Cut them into shorter ones"
        )
    return ids_BT.astype(np.int32)


def output_paths(out: Path, depths: int) -> list[Path]:
    """Files of the main head and of MTP modules 1..depths: x.npy, x.mtp.npy, x.mtp2.npy."""
    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: the name must end in .npy")
    names = ["mtp" if k == 1 else f"mtp{k}" for k in range(1, depths + 1)]
    return [out, *(out.with_suffix(f".{name}.npy") for name in names)]


class NpyWriter:
    """Files of fp32 [B, ...] written a few rows at a time; they get their names when whole.

    Written, not mapped: a full disk is then an OSError and not a signal that ends the program.
    """

    def __init__(self, paths: Sequence[Path], shape: tuple[int, ...]):
        self._paths, self._parts = list(paths), [p.with_name(f"{p.name}.partial") for p in paths]
        self._left = shape[0]
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(part.open("wb")) for part in self._parts]
            for file in self._files:
                np.lib.format.write_array_header_1_0(file, header)
            self._stack = stack.pop_all()

    def append(self, arrays: Sequence[np.ndarray]) -> None:
        """The next rows of every file."""
        for file, array in zip(self._files, arrays, strict=True):
            file.write(np.ascontiguousarray(array, "<f4").data)
        self._left -= len(arrays[0])

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stack.close()
        whole = kind is None and self._left == 0
        for path, part in zip(self._paths, self._parts, strict=True):
            if whole:
                os.replace(part, path)
            else:
                part.unlink()
