"""Checkpoints: other meshes, damage, strangers, full disks, kills."""

import contextlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.checksum import checksums
from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from checkpoint.retention import KeepNewestAndBest

# When one of several reads fails, the others come back to an event loop that is closed already;
# Python prints that and goes on. It says nothing about our code.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ALL = CheckpointConfig(keep=10)


def mesh(**axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


SAVE_MESH = mesh(fsdp=4, tensor=2)
SAVE_SPECS = {"w": P("fsdp", "tensor"), "experts": P("fsdp", None, "tensor"), "norm": P()}
LOAD_MESH = mesh(data=2, fsdp=2, tensor=2)
LOAD_SPECS = {"w": P("tensor", ("data", "fsdp")), "experts": P(None, "fsdp"), "norm": P("data")}


def values(seed: int, width: int = 8):
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.standard_normal((8, width)).astype(np.float32),
        "experts": rng.standard_normal((4, 2, 6)).astype(np.float32),
        "norm": rng.standard_normal(8).astype(np.float32),
    }
    moments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adam = optax.ScaleByAdamState(np.int32(seed), moments, moments)
    return {"step": np.int32(seed), "params": params, "opt": (adam, optax.EmptyState())}


def shardings(on, specs):
    placed = {name: NamedSharding(on, spec) for name, spec in specs.items()}
    scalar = NamedSharding(on, P())
    adam = optax.ScaleByAdamState(scalar, placed, placed)
    return {"step": scalar, "params": placed, "opt": (adam, optax.EmptyState())}


def state(seed: int, on=SAVE_MESH, specs=SAVE_SPECS, **sizes):
    return jax.device_put(values(seed, **sizes), shardings(on, specs))


def abstract(on=LOAD_MESH, specs=LOAD_SPECS, **sizes):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        values(0, **sizes), shardings(on, specs),
    )  # fmt: skip


def save(manager: CheckpointManager, *steps: int, loss: float | None = None) -> None:
    for step in steps:
        metrics = {} if loss is None else {"eval/loss": loss}
        assert manager.save(step, state(step), {"preset": "t"}, {"fsdp": 4, "tensor": 2}, metrics)
    assert manager.wait()


def assert_is(restored, step: int) -> None:
    """Bit-equal to the state saved at `step`."""
    expected = values(step)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert found.dtype == wanted.dtype
        assert np.asarray(found).tobytes() == wanted.tobytes()


def biggest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_restore_on_another_mesh_is_bit_equal(tmp_path, asynchronous):
    config = CheckpointConfig(asynchronous=asynchronous)
    with CheckpointManager(tmp_path, config) as manager:
        assert manager.restore(abstract()) is None  # an empty folder is a fresh start
        save(manager, 3, loss=2.5)
    with CheckpointManager(tmp_path, config) as manager:
        restored = manager.restore(abstract())
        assert manager.steps() == [3]
        meta = manager.meta(3)
    assert_is(restored, 3)
    assert restored["params"]["w"].sharding == NamedSharding(LOAD_MESH, LOAD_SPECS["w"])
    assert (meta["step"], meta["config"], meta["mesh"], meta["metrics"]) == (
        3, {"preset": "t"}, {"fsdp": 4, "tensor": 2}, {"eval/loss": 2.5},
    )  # fmt: skip


def test_leaves_come_back_in_their_own_places(tmp_path):
    # As names, item/10 sorts before item/2: an order of names is not the order of leaves.
    items = tuple(jnp.full((2,), i, jnp.float32) for i in range(12))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items
    )
    with CheckpointManager(tmp_path, ALL) as manager:
        assert manager.save(1, items, {}, {}, {})
        restored = manager.restore(wanted)
    assert [float(x[0]) for x in restored] == list(range(12))


def test_restore_of_the_weights_alone(tmp_path):
    with CheckpointManager(tmp_path, ALL) as manager:
        save(manager, 3)
    with CheckpointManager(tmp_path, ALL, read_only=True) as manager:
        wanted = {"params": abstract()["params"]}
        restored = manager.restore(wanted, partial=True)
        np.testing.assert_array_equal(restored["params"]["w"], values(3)["params"]["w"])
        with pytest.raises(ValueError, match=r"opt/0/mu/\w+: found bfloat16.*expected nothing"):
            manager.restore(wanted)


def test_donated_state_does_not_disturb_the_save(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with CheckpointManager(tmp_path, ALL) as manager:
        before = state(5)
        assert manager.save(5, before, {}, {}, {})
        jax.block_until_ready(step(before))  # the next step reuses the memory at once
        assert manager.wait()
        assert_is(manager.restore(abstract()), 5)


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped bit", "no metadata", "cut meta"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    with CheckpointManager(tmp_path, ALL) as manager:
        save(manager, 1, 2)
    newest = tmp_path / "step_00000002"
    file = biggest_file(newest / "state" / "d")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "gone":
        file.unlink()
    elif damage == "flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 4
        file.write_bytes(content)
    elif damage == "no metadata":
        (newest / "state" / "_METADATA").write_text("{")
    else:
        (newest / "meta" / "metadata").write_text('{"format": 1, "st')
    with CheckpointManager(tmp_path, ALL) as manager:
        with pytest.warns(UserWarning, match=r"passed over: \S+step_00000002: .+ next older"):
            restored = manager.restore(abstract())
        assert_is(restored, 1)
        # The run goes on from step 1, arrives at step 2 again, and saves it.
        with pytest.warns(UserWarning, match="renamed to step_00000002.unreadable-1"):
            save(manager, 2)
        assert_is(manager.restore(abstract()), 2)


def test_bits_changed_in_stored_arrays_are_noticed(tmp_path):
    # Array files of this size hold raw numbers: storage alone gives back the wrong ones.
    on = mesh(fsdp=8)
    big = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
    placed = {"w": jax.device_put(big, NamedSharding(on, P("fsdp")))}
    wanted = {"w": jax.ShapeDtypeStruct(big.shape, big.dtype, sharding=placed["w"].sharding)}
    with CheckpointManager(tmp_path, ALL) as manager:
        assert manager.save(1, placed, {}, {}, {})
        manager.wait()
        file = biggest_file(tmp_path / "step_00000001")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
        with (
            pytest.warns(UserWarning, match="w and 0 more changed since they were saved"),
            pytest.raises(ValueError, match="no checkpoint can be restored"),
        ):
            manager.restore(wanted)


def test_checksums_do_not_depend_on_the_layout_and_see_every_word():
    here = jax.tree.leaves(checksums({"w": state(1)["params"]["w"]}))
    there = jax.tree.leaves(checksums({"w": state(1, LOAD_MESH, LOAD_SPECS)["params"]["w"]}))
    assert here == there
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_):
        x = np.zeros((3, 5), dtype)
        sums = {checksums({"x": jnp.asarray(x)})["x"]}
        for index in np.ndindex(3, 5):
            one = x.copy()
            one[index] = 1
            sums.add(checksums({"x": jnp.asarray(one)})["x"])
        assert len(sums) == 16  # one changed word changes the sum, each place differently


def foreign_random(folder: Path) -> None:
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "weights.bin").write_bytes(os.urandom(100))


def foreign_orbax(folder: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {"theirs": jnp.ones(3)})


@pytest.mark.parametrize("make", [foreign_random, foreign_orbax])
def test_foreign_folders_are_passed_over_and_kept(tmp_path, make):
    config = CheckpointConfig(keep=1, keep_best=0)
    with CheckpointManager(tmp_path, config) as manager:
        save(manager, 1)
    foreign = tmp_path / "step_00000009"
    make(foreign)
    inside = sorted(p.relative_to(foreign) for p in foreign.rglob("*"))
    with CheckpointManager(tmp_path, config) as manager:
        assert manager.steps() == [1]
        with pytest.warns(UserWarning, match="step_00000009: not a checkpoint of this program"):
            assert_is(manager.restore(abstract()), 1)
        save(manager, 2, 3)
        assert manager.steps() == [3]
        assert sorted(p.relative_to(foreign) for p in foreign.rglob("*")) == inside
        with pytest.warns(UserWarning, match="renamed to step_00000009.unreadable-1"):
            save(manager, 9)
        assert manager.steps() == [9]


def test_nothing_good_is_an_error_that_lists_each(tmp_path):
    foreign_random(tmp_path / "step_00000001")
    foreign_random(tmp_path / "200")
    with CheckpointManager(tmp_path, ALL) as manager:
        words = r"(?s)step_00000001: not a checkpoint.*/200: not a checkpoint.*another run_dir"
        with (
            pytest.warns(UserWarning, match="step_00000001"),
            pytest.raises(ValueError, match=words),
        ):
            manager.restore(abstract())


def test_another_model_is_an_error_and_no_fallback(tmp_path):
    with CheckpointManager(tmp_path, ALL) as manager:
        save(manager, 1, 2)
        words = r"(?s)step_00000002.*params/w: expected float32\[8, 16\], found float32\[8, 8\]"
        with pytest.raises(ValueError, match=words):
            manager.restore(abstract(width=16))
        fewer = abstract()
        del fewer["params"]["norm"]
        with pytest.raises(ValueError, match=r"params/norm: found float32\[8\], expected nothing"):
            manager.restore(fewer)
        more = abstract()
        more["ema"] = more["params"]["norm"]
        with pytest.raises(ValueError, match=r"ema: expected float32\[8\], found nothing"):
            manager.restore(more)


def test_newest_and_best_are_kept_also_across_restarts(tmp_path):
    config = CheckpointConfig(keep=2, keep_best=1)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5}
    for step, loss in losses.items():
        with CheckpointManager(tmp_path, config) as manager:  # a new process each time
            save(manager, step, loss=loss)
    with CheckpointManager(tmp_path, config) as manager:
        assert manager.steps() == [2, 4, 5]
        assert manager.meta(4)["metrics"] == {"eval/loss": "nan"}
        save(manager, 6)
        assert manager.steps() == [2, 5, 6]


def test_retention_rule():
    policy = KeepNewestAndBest(keep=1, keep_best=2)
    for step, loss in {1: 2.0, 2: 1.0, 3: 1.0, 4: None}.items():
        policy.note(step, loss)
    assert policy.kept([1, 2, 3, 4, 77]) == {2, 3, 4, 77}
    policy.forget(4)  # unreadable: neither counted nor deleted
    assert policy.kept([1, 2, 3, 4]) == {2, 3, 4}
    assert KeepNewestAndBest(2, 0).kept([1, 2]) == {1, 2}  # not told of any: nothing to delete
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointManager("unused", CheckpointConfig(keep=0))


def test_saving_a_step_again_keeps_the_first(tmp_path):
    with CheckpointManager(tmp_path, ALL) as manager:
        save(manager, 4)
        assert manager.save(4, state(99), {}, {}, {})
        assert manager.wait()
        assert_is(manager.restore(abstract()), 4)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Files may not grow beyond `size` bytes: the same kind of errors as a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_a_warning_and_loses_nothing(tmp_path, asynchronous):
    on = NamedSharding(mesh(fsdp=8), P("fsdp"))
    tree = lambda seed: {  # noqa: E731
        "w": jax.device_put(np.random.default_rng(seed).standard_normal((512, 128)), on)
    }
    config = CheckpointConfig(keep=1, keep_best=0, asynchronous=asynchronous)
    with CheckpointManager(tmp_path, config) as manager:
        assert manager.save(1, tree(1), {}, {}, {})
        assert manager.wait()
        words = "step 2 was not saved .* training goes on"
        with pytest.warns(RuntimeWarning, match=words), files_of_at_most(1 << 16):
            assert not (manager.save(2, tree(2), {}, {}, {}) and manager.wait())
        assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]  # its space is free again
        assert manager.save(3, tree(3), {}, {}, {})  # there is room again
        assert manager.wait()
        assert manager.steps() == [3]


def test_a_folder_that_vanishes_is_a_warning(tmp_path):
    folder = tmp_path / "run"
    with CheckpointManager(folder, ALL) as manager:
        shutil.rmtree(folder)
        folder.write_text("somebody's file")
        with pytest.warns(RuntimeWarning, match=r"step 1 was not saved"):
            saved = manager.save(1, state(1), {}, {}, {}) and manager.wait()
        assert not saved
    with pytest.raises(OSError, match="run"):
        CheckpointManager(folder, ALL)


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    script = textwrap.dedent("""
        import os, sys
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        from pathlib import Path
        import tests.test_checkpoint as t
        folder = Path(sys.argv[1])
        manager = t.CheckpointManager(folder, t.ALL)
        t.save(manager, 1)
        manager.save(2, t.state(2), {}, {}, {})
        os._exit(9)  # nothing is flushed, no thread is joined
    """)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 9
    names = sorted(p.name for p in tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*did not finish; removed")
        manager = CheckpointManager(tmp_path, ALL)
    with manager:
        whole = manager.steps()
        assert whole in ([1], [1, 2]), names  # the kill may come late
        assert_is(manager.restore(abstract()), whole[-1])


def test_an_unfinished_save_is_removed_with_a_warning(tmp_path):
    with CheckpointManager(tmp_path, ALL) as manager:
        save(manager, 1)
    left = tmp_path / "step_00000002.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "step_00000001", left)
    with CheckpointManager(tmp_path, ALL, read_only=True) as manager:
        assert_is(manager.restore(abstract()), 1)
        assert left.exists()  # a reader touches nothing: the run may still be writing
    with pytest.warns(UserWarning, match="did not finish; removed"):
        manager = CheckpointManager(tmp_path, ALL)
    with manager:
        assert not left.exists()
        assert_is(manager.restore(abstract()), 1)


def test_meta_is_plain_json(tmp_path):
    with CheckpointManager(tmp_path, ALL) as manager:
        save(manager, 1)
    meta = json.loads((tmp_path / "step_00000001" / "meta" / "metadata").read_text())
    assert set(meta["checksums"]) >= {"step", "params/w", "opt/0/mu/w", "opt/0/nu/norm"}


@pytest.mark.parametrize(
    ("file", "error", "news"),
    [
        ("/site/orbax/checkpoint/_src/futures/future.py", ValueError("RESOURCE_EXHAUSTED"), False),
        ("/site/elsewhere/future.py", ValueError("RESOURCE_EXHAUSTED"), True),
        ("/site/orbax/checkpoint/checkpoint_manager.py", None, True),
    ],
)
def test_a_failed_save_is_told_once(file, error, news):
    """Orbax's tracebacks of it are thousands of lines; other records pass."""
    told = None if error is None else (type(error), error, None)
    record = logging.LogRecord("absl", logging.ERROR, file, 1, "a thread raised", (), told)
    assert logging.getLogger("absl").filter(record) is (record if news else False)
