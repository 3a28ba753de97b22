"""What the layout of the project promises: imports point one way, files are small, nothing is idle.

The tests read source text and import nothing of the project; one, which says so, runs imports.
"""

import ast
import functools
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

ALLOWED_IMPORTS = {
    "runtime": (),
    "pallas_kernels": (),
    "sharding": (),
    "data": (),
    "model": ("sharding", "pallas_kernels"),
    "training": ("model", "sharding", "runtime"),
    "checkpoint": ("model.config", "sharding"),
    "generation": ("model", "sharding", "pallas_kernels", "data"),
    "programs": ("training", "model", "sharding", "pallas_kernels", "runtime"),
    "rl": (
        "runtime", "pallas_kernels", "sharding", "data", "model", "training", "checkpoint",
        "generation", "configs.schema",
    ),
}  # fmt: skip
"""What a package may import of the project besides its own package."""

PACKAGES = (*ALLOWED_IMPORTS, "configs")
ALLOWED_IMPORTS["configs"] = tuple(f"{package}.config" for package in PACKAGES)

FREE_PACKAGES = ("bench",)
"""Folders that may import every package, but no entry point, test or (unless their own) bench."""

PLACEMENT = {"PartitionSpec", "NamedSharding", "Mesh", "AbstractMesh", "shard_map"}
COLLECTIVES = {
    "psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ppermute",
    "ragged_all_to_all", "axis_index", "axis_size",
}  # fmt: skip

SKIPPED_FOLDERS = {"__pycache__", "build", "cache", "runs"}


# ---- reading the source -------------------------------------------------------------------------


@functools.cache
def project_files() -> tuple[pathlib.Path, ...]:
    """Files of the project relative to its root; environments, caches and runs left out."""

    def walk(folder: pathlib.Path):
        for entry in sorted(folder.iterdir()):
            hidden = entry.name.startswith(".") and entry.name != ".ci"
            if entry.is_dir():
                if not (hidden or entry.name in SKIPPED_FOLDERS or entry.suffix == ".egg-info"):
                    yield from walk(entry)
            elif not hidden or entry.suffix in {".yaml", ".yml"}:
                yield entry.relative_to(ROOT)

    return tuple(walk(ROOT))


def product_files() -> list[pathlib.Path]:
    """Python files of packages, entry points and bench: all but tests."""
    return [path for path in project_files() if path.suffix == ".py" and path.parts[0] != "tests"]


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def top_level_modules() -> set[str]:
    """Names that an import of this project can start with."""
    return {path.parts[0].removesuffix(".py") for path in product_files()} | {"tests"}


def entry_points() -> set[str]:
    return {path.stem for path in product_files() if len(path.parts) == 1}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted modules that a file imports, also inside functions; relative ones made absolute."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            for alias in node.names:
                name = f"{module}.{alias.name}"
                stem = ROOT / name.replace(".", "/")
                is_module = stem.is_dir() or stem.with_suffix(".py").exists()
                found.add(name if is_module else module)
    return found


def may_import(path: pathlib.Path, module: str) -> bool:
    own, target = path.parts[0], module.split(".")[0]
    if target == own and len(path.parts) > 1:
        return True
    if target in entry_points() | {"tests", "bench"}:
        return False
    if len(path.parts) == 1 or own in FREE_PACKAGES:
        return True
    allowed = ALLOWED_IMPORTS.get(path.as_posix(), ALLOWED_IMPORTS[own])
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


# ---- imports ------------------------------------------------------------------------------------


def test_every_package_has_its_rule():
    folders = {path.parts[0] for path in product_files() if len(path.parts) > 1}
    assert folders == set(PACKAGES) | set(FREE_PACKAGES)


def test_imports_point_one_way():
    wrong = [
        f"{path} imports {module}"
        for path in product_files()
        for module in sorted(imports(path))
        if module.split(".")[0] in top_level_modules() and not may_import(path, module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "module", "expected"),
    [
        ("model/mla.py", "sharding.partition", True),
        ("model/mla.py", "training.step", False),
        ("model/mla.py", "train", False),
        ("training/step.py", "model.router", True),
        ("rl/loop.py", "configs.schema", True),
        ("rl/loop.py", "configs.tiny", False),
        ("runtime/devices.py", "sharding.mesh", False),
        ("checkpoint/names.py", "model.config", True),
        ("checkpoint/names.py", "model.transformer", False),
        ("configs/tiny.py", "training.config", True),
        ("configs/tiny.py", "training.step", False),
        ("train.py", "model.transformer", True),
        ("train.py", "bench.step", False),
        ("bench/step.py", "bench.timing", True),
        ("bench/step.py", "tests.conftest", False),
    ],
)
def test_import_rule(path, module, expected):
    assert may_import(pathlib.Path(path), module) is expected


def test_kernels_are_reached_through_their_folders():
    """Each folder's `__init__.py` is its entry; benchmarks and tests look inside too."""
    wrong = [
        f"{path} imports {module}; import it from the folder"
        for path in product_files()
        if path.parts[0] not in ("pallas_kernels", "bench")
        for module in sorted(imports(path))
        if module.startswith("pallas_kernels.") and not is_kernel_entry(module)
    ]
    assert not wrong, "\n".join(wrong)


def is_kernel_entry(module: str) -> bool:
    """A folder of kernels, or the types that all of them share."""
    folder = ROOT / module.replace(".", "/")
    return module == "pallas_kernels.mosaic" or (folder.is_dir() and module.count(".") == 1)


def test_folders_of_kernels_import_each_other_one_way():
    order = ["grouped", "attention", "decode", "cross_entropy", "fp8"]
    folders = {
        p.parts[1] for p in product_files() if p.parts[0] == "pallas_kernels" and p.parts[2:]
    }
    assert folders == set(order)
    wrong = [
        f"{path} imports {module}"
        for path in product_files()
        if path.parts[0] == "pallas_kernels"
        for module in sorted(imports(path))
        if (inner := module.split(".")[1:2]) and inner[0] in folders
        if path.parts[1] not in folders or order.index(inner[0]) > order.index(path.parts[1])
    ]
    assert not wrong, "\n".join(wrong)


def config_files() -> list[pathlib.Path]:
    return [
        path
        for path in product_files()
        if len(path.parts) > 1 and (path.name == "config.py" or path.parts[0] == "configs")
    ]


def test_configs_import_nothing_heavy():
    """Only the standard library, the dataclasses themselves, and tyro, which reads the command line
    into them: `--help` must answer at once."""
    light = sys.stdlib_module_names | top_level_modules() | {"tyro"}
    wrong = [
        f"{path} imports {module}"
        for path in config_files()
        for module in sorted(imports(path))
        if module.split(".")[0] not in light
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_configs_does_not_import_jax():
    """Runs the imports, since a package's __init__ could still pull something in."""
    modules = [".".join(path.with_suffix("").parts) for path in config_files()]
    modules = [module.removesuffix(".__init__") for module in modules]
    heavy = ("jax", "flax", "optax", "orbax", "grain", "tensorstore", "tokenizers", "matplotlib")
    code = (
        f"import sys, {', '.join(modules)}\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# ---- placement lives in sharding/ ---------------------------------------------------------------


@functools.cache
def mesh_axes() -> tuple[str, ...]:
    """The value of AXES in sharding/config.py."""
    for node in tree(pathlib.Path("sharding/config.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AXES":
            return ast.literal_eval(node.value)
    raise AssertionError("sharding/config.py no longer assigns AXES; this test reads it")


def placements(module: ast.Module):
    """(line, name) of everything in a module that speaks of meshes instead of logical names."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            for alias in node.names:
                if alias.name in PLACEMENT | COLLECTIVES | {"make_mesh"}:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute):
            of_jax = ast.unparse(node.value) in ("jax", "lax", "jax.lax")
            if node.attr in PLACEMENT or (of_jax and node.attr in COLLECTIVES | {"make_mesh"}):
                yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg in ("axis_name", "axis_names"):
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            of_shape = isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
            if of_shape and node.slice.value in mesh_axes():
                yield node.lineno, f"shape[{node.slice.value!r}]"


def test_placement_lives_in_sharding():
    wrong = [
        f"{path}:{line}: {name}"
        for path in product_files()
        if path.parts[0] not in ("sharding", "bench")
        for line, name in placements(tree(path))
        # A kernel asks for its place in its own grid, which is no mesh.
        if (path.parts[0], name) != ("pallas_kernels", "axis_index")
    ]
    assert not wrong, "only sharding/ names meshes, specs and collectives\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "from jax.sharding import PartitionSpec as P",
        "x = jax.sharding.NamedSharding(m, s)",
        "m = jax.make_mesh((8,), ('data',))",
        "from jax import shard_map",
        "y = lax.psum(x, axes)",
        "y = f(x, axis_name='fsdp')",
        "n = layout.mesh.shape['expert']",
    ],
)
def test_placement_is_seen(source):
    assert list(placements(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["from sharding.mesh import make_mesh", "y = constrain(x, 'batch', 'expert')"]
)
def test_logical_names_are_no_placement(source):
    assert not list(placements(ast.parse(source)))


# ---- sizes --------------------------------------------------------------------------------------


def test_files_stay_small():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in product_files()}
    long = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines\n" + "\n".join(long)


def test_functions_stay_small():
    long = [
        f"{path}:{node.lineno} {node.name}: {lines} lines"
        for path in product_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, f"over {MAX_FUNCTION_LINES} lines\n" + "\n".join(long)


# ---- configuration ------------------------------------------------------------------------------


def config_classes() -> list[tuple[pathlib.Path, ast.ClassDef]]:
    """The dataclasses that a run is configured by."""
    schemas = [p for p in product_files() if p.name == "config.py" or p.match("configs/schema.py")]
    return [
        (path, node)
        for path in schemas
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
    ]


def reads(path: pathlib.Path) -> set[str]:
    """Attributes that a file reads; `getattr(config, axis) for axis in AXES` reads every axis."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.DictComp | ast.ListComp | ast.GeneratorExp):
            over_axes = ast.unparse(node.generators[0].iter) == "AXES"
            if over_axes and "getattr(" in ast.unparse(node):
                found.update(mesh_axes())
    return found


def test_every_config_field_is_read():
    """Read by the program itself: by no config file, no bench and no test."""
    idle = {path for path, _ in config_classes()}
    readers = [
        p for p in product_files() if p not in idle and p.parts[0] not in ("configs", "bench")
    ]
    read = set().union(*map(reads, readers))
    fields = [
        f"{path}:{statement.lineno} {node.name}.{ast.unparse(statement.target)}"
        for path, node in config_classes()
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    ]
    assert len(fields) > 50, "the search for fields no longer finds them"
    unread = [field for field in fields if field.split(".")[-1] not in read]
    assert not unread, "fields that nothing reads\n" + "\n".join(unread)


def test_every_config_field_has_a_docstring():
    """The text under a field is its line in --help."""
    bare = [
        f"{path}:{statement.lineno} {ast.unparse(statement.target)}"
        for path, node in config_classes()
        for statement, after in itertools.zip_longest(node.body, node.body[1:])
        if isinstance(statement, ast.AnnAssign) and not is_docstring(after)
    ]
    assert not bare, "\n".join(bare)


def is_docstring(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


# ---- text ---------------------------------------------------------------------------------------


def lines_matching(paths, pattern: str) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_nothing_is_left_to_do():
    found = lines_matching(product_files(), r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    assert not found, "\n".join(found)


def test_no_registry_hosts_and_no_paths_of_one_machine():
    written = [
        path for path in project_files() if path.suffix not in {".npz", ".png", ".safetensors"}
    ]
    hosts = (
        r"pyp[i][.]org|python[h]osted|npm[j]s[.]|debia[n][.]org|--(extra-)?index[-]url|[.]wh[l]\b"
    )
    homes = r"(?<![\w.])/(root|work|farm|home|Users)/\w"
    found = lines_matching(written, f"{hosts}|{homes}")
    found = [line for line in found if not line.startswith("tests/test_structure.py")]
    assert not found, "\n".join(found)


def test_public_names_have_docstrings():
    """Modules, and the classes and functions at their top level."""
    bare = []
    for path in product_files():
        module = tree(path)
        if module.body and not ast.get_docstring(module):
            bare.append(f"{path}: the module")
        bare += [
            f"{path}:{node.lineno} {node.name}"
            for node in module.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert not bare, "\n".join(bare)


# ---- lock files ---------------------------------------------------------------------------------


def locked(name: str) -> dict[str, str]:
    """Version by name from a lock file; every line pins one package and says nothing else."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{name}: {line!r} is no NAME==VERSION"
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_lock_files_hold_what_pyproject_asks_for():
    project = PYPROJECT["project"]
    base, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert not base.keys() & dev.keys()
    for requirements, versions in [
        (project["dependencies"], base),
        (PYPROJECT["build-system"]["requires"], base),
        (project["optional-dependencies"]["dev"], base | dev),
    ]:
        for requirement in map(Requirement, requirements):
            version = versions.get(canonicalize_name(requirement.name))
            assert version, f"{requirement} is not locked"
            assert version in requirement.specifier, f"{requirement}, but {version} is locked"
