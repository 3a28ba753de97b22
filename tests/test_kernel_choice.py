"""Which backend each hot path takes, and what is said about it; and blocks that were timed."""

import dataclasses
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import preset
from model.kernels import choose
from model.recipe import Kernels
from pallas_kernels import tuned
from sharding.config import MeshConfig
from sharding.mesh import make_layout

SMALL = preset("small").model
"""Its types and widths fit the kernels."""
ONE = MeshConfig(data=1)


def layout_on(device: dict, mesh: MeshConfig = ONE, count: int = 1):
    """A layout whose devices say that they are something else."""
    layout = make_layout(mesh, jax.devices()[:count])
    mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(**device)] * count),
        shape=dict(layout.mesh.shape),
        axis_names=layout.mesh.axis_names,
        size=count,
    )
    return dataclasses.replace(layout, mesh=mesh)


HOPPER = {"platform": "gpu", "device_kind": "NVIDIA H200", "compute_capability": "9.0"}
AMPERE = HOPPER | {"device_kind": "NVIDIA A100", "compute_capability": "8.0"}
CPU = {"platform": "cpu", "device_kind": "cpu"}


def test_auto_takes_kernels_on_hopper():
    choice = choose("auto", SMALL, "bfloat16", layout_on(HOPPER))
    assert choice.kernels == Kernels("mosaic", "mosaic", "mosaic", "mosaic")
    assert choice.describe() == ["attention, decode, experts, loss: mosaic"]


@pytest.mark.parametrize(
    ("device", "reason"), [(CPU, "the devices are cpu"), (AMPERE, "compute capability 8.0")]
)
def test_auto_takes_xla_elsewhere_and_says_why(device, reason):
    choice = choose("auto", SMALL, "bfloat16", layout_on(device))
    assert set(choice.kernels) == {"portable"}
    assert [line.split(" (")[0] for line in choice.describe()] == [
        "attention, decode, experts, loss: portable"
    ]
    assert reason in choice.describe()[0]


def test_auto_decides_per_hot_path():
    cut = MeshConfig(context=2)
    choice = choose("auto", SMALL, "bfloat16", layout_on(HOPPER, cut, 2))
    assert choice.kernels == Kernels("portable", "mosaic", "mosaic", "mosaic")
    assert any(
        line.startswith("attention: portable (sequences are cut") for line in choice.describe()
    )


DENSE = preset("llama31_8b").model


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "attention"),
    [
        (HOPPER, "bfloat16", 128, "mosaic"),
        (HOPPER, "bfloat16", 72, "cudnn"),  # no multiple of 16
        (HOPPER, "bfloat16", 256, "portable"),  # too wide for both
        (HOPPER, "float32", 128, "portable"),
        (AMPERE, "bfloat16", 128, "cudnn"),
        (CPU, "bfloat16", 128, "portable"),
    ],
)
def test_grouped_attention_goes_to_cudnn_where_the_kernel_cannot(device, dtype, heads, attention):
    model = dataclasses.replace(DENSE, qk_rope_head_dim=heads, v_head_dim=heads)
    choice = choose("auto", model, dtype, layout_on(device))
    assert choice.kernels.attention == attention
    assert "experts" not in "".join(choice.describe())
    cut = choose("auto", model, dtype, layout_on(device, MeshConfig(context=2), 2))
    assert cut.kernels.attention == "portable"


def test_fp32_goes_to_xla():
    choice = choose("auto", SMALL, "float32", layout_on(HOPPER))
    assert set(choice.kernels) == {"portable"}
    assert "float32" in choice.describe()[0]


def test_asking_for_kernels_that_cannot_run_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"kernels=mosaic .*\(attention, decode.*: the devices are cpu[^;]*\).*auto",
    ):
        choose("mosaic", SMALL, "bfloat16", layout_on(CPU))
    with pytest.raises(ValueError, match="the emulator runs on one device"):
        choose("emulated", SMALL, "bfloat16", layout_on(CPU, MeshConfig(data=2), 2))
    with pytest.raises(ValueError, match="on CPU, not on NVIDIA H200"):
        choose("emulated", SMALL, "bfloat16", layout_on(HOPPER))


def test_other_backends_are_taken_as_they_are():
    assert set(choose("reference", SMALL, "float32", layout_on(CPU)).kernels) == {"reference"}
    assert set(choose("portable", SMALL, "bfloat16", layout_on(HOPPER)).kernels) == {"portable"}


class Blocks(NamedTuple):
    rows: int
    stages: int


def test_blocks_timed_on_a_device_are_found_on_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    assert tuned.device_name() == ""  # tests run on CPU
    entry = {"blocks": {"rows": 128, "stages": 4}, "ms": 0.5}
    tuned.record("nvidia_h200", "matmul", "M64 K128", entry)
    tuned.record("nvidia_h200", "matmul", "M128 K128", entry | {"ms": 0.7})
    assert tuned.tuned_blocks("matmul", "M64 K128", Blocks) is None
    monkeypatch.setattr(tuned, "device_name", lambda: "nvidia_h200")
    assert tuned.tuned_blocks("matmul", "M64 K128", Blocks) == Blocks(128, 4)
    assert tuned.tuned_blocks("matmul", "M32 K128", Blocks) is None
    assert tuned.tuned_blocks("decode", "M64 K128", Blocks) is None
    monkeypatch.setattr(tuned, "device_name", lambda: "nvidia_h100_80gb_hbm3")
    assert tuned.tuned_blocks("matmul", "M64 K128", Blocks) is None


def test_blocks_of_another_kernel_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "device_name", lambda: "nvidia_h200")
    tuned.record("nvidia_h200", "matmul", "M64", {"blocks": {"columns": 128}, "ms": 1.0})
    with pytest.raises(ValueError, match=r"matmul\.json.*'M64' does not hold.*tune it again"):
        tuned.tuned_blocks("matmul", "M64", Blocks)
