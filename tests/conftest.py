"""Eight CPU devices for every test, and what tests share."""

import gc
import os
import pathlib

from tests.xla_flags import QUICK_XLA

# All are read when jax is first imported, so they are set before anything imports it. A platform
# chosen outside stays: the `gpu` tests run with JAX_PLATFORMS=cuda. Compiling is most of what the
# tests do, and LLVM's optimisations are half of that; no tolerance depends on them. One thread per
# device, because with few cores collectives and split products can wait for each other forever.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PJRT_NPROC"] = "64"
# Lines of source in a program: a tenth of its compile time, and no test reads them.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = " ".join(
    [
        QUICK_XLA,
        "--xla_cpu_multi_thread_eigen=false",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

import hypothesis
import jax
import pytest

# Tracing makes many objects and few cycles: at the default, collecting is a tenth of its time.
gc.set_threshold(100_000, 20, 100)

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Derandomised: what is red here is red on the next machine. No deadline: a first example compiles.
hypothesis.settings.register_profile(
    "meshseek", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("meshseek")


MOST_MAPPINGS = 20_000
"""Memory mappings at which a test process drops its compiled programs; Linux allows 65,530."""


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Every compiled program maps memory of its own; a process with too many crashes in LLVM."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


LONGEST = (
    "test_kernel_compile.py", "test_processes.py", "test_rl_loop.py", "test_bench_scripts.py",
    "test_layouts.py", "test_pipeline.py", "test_fp8_model.py", "test_rl_tuning.py",
    "test_context.py", "test_rl_own_prompts.py", "test_held.py", "test_reductions.py",
    "test_train.py", "test_redundant_experts.py", "test_readme.py", "test_collectives.py",
    "test_rl_traces.py", "test_kernel_training.py", "test_generate.py", "test_rl_sft.py",
    "test_regressions.py", "test_generation.py", "test_reference.py", "test_kernel_grouped.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, so that at the end no worker is alone with one."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture
def strict_promotion():
    """Arrays of unlike types do not mix: an unintended fp32 or bf16 is an error.

    Not on for every test, because optax computes its bias correction as float ** int32.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def reference_python() -> str:
    """Interpreter with torch and transformers; `make reference-env` makes it."""
    python = ROOT / os.environ.get("REFERENCE_VENV", ".venv-reference") / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist; run `make reference-env`", pytrace=False)
    return str(python)
