"""What the layout of the project promises: imports point one way, parts are small, nothing is idle.

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

from tests.sizes import (
    BUDGETS,
    ROOT,
    TOLERANCE,
    Size,
    part_of,
    product_files,
    project_files,
    sizes,
    tree,
)

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

ALLOWED_IMPORTS = {
    "runtime": (),
    "pallas_kernels": (),
    "sharding": (),
    "data": (),
    "model": ("sharding", "pallas_kernels"),
    "training": ("model", "sharding", "runtime"),
    "training/run.py": ("model", "sharding", "runtime", "checkpoint"),
    "checkpoint": ("model.config", "sharding", "vision.config"),
    "generation": ("model", "sharding", "pallas_kernels", "data"),
    "programs": ("training", "model", "sharding", "pallas_kernels", "runtime"),
    "planning": (
        "programs", "training", "model", "sharding", "pallas_kernels", "runtime", "configs",
    ),
    "vision/config.py": ("model.config",),
    "vision/options.py": (),
    "vision": (
        "runtime", "sharding", "data", "model", "training", "checkpoint", "generation",
        "configs.schema",
    ),
    "rl": (
        "runtime", "pallas_kernels", "sharding", "data", "model", "training", "checkpoint",
        "generation", "configs.schema",
    ),
}  # fmt: skip
"""What a package, or one file of it, may import of the project besides its own package."""

PACKAGES = (*(name for name in ALLOWED_IMPORTS if "/" not in name), "configs")
ALLOWED_IMPORTS["configs"] = tuple(f"{package}.config" for package in PACKAGES)

FREE_PACKAGES = ("bench",)
"""Folders that may import every package, but no entry point, test or (unless their own) bench."""

PLACEMENT = {"PartitionSpec", "NamedSharding", "Mesh", "AbstractMesh", "shard_map"}
COLLECTIVES = {
    "psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ppermute",
    "ragged_all_to_all", "axis_index", "axis_size", "with_sharding_constraint",
}  # fmt: skip


# ---- reading the source -------------------------------------------------------------------------


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
        ("checkpoint/names.py", "vision.config", True),
        ("vision/stage.py", "training.step", True),
        ("vision/stage.py", "rl.loop", False),
        ("vision/config.py", "training.step", False),
        ("model/transformer.py", "vision.janus", False),
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
    order = ["library", "grouped", "attention", "decode", "cross_entropy", "fp8"]
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
            if isinstance(node.value, ast.Attribute) and node.value.attr == "mesh":
                yield node.lineno, f"mesh.{node.attr}"
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
    """Except where compiled programs are read or layouts planned, and for the sum that processes
    form before a layout exists."""
    wrong = [
        f"{path}:{line}: {name}"
        for path in product_files()
        if path.parts[0] not in ("sharding", "programs", "planning", "bench")
        for line, name in placements(tree(path))
        # A kernel asks for its place in its own grid, which is no mesh.
        if (path.parts[0], name) != ("pallas_kernels", "axis_index")
        and path != pathlib.Path("runtime/processes.py")
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
        "kind = layout.mesh.devices.flat[0].device_kind",
        "x = jax.lax.with_sharding_constraint(x, s)",
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


def test_parts_keep_to_their_budgets():
    """`python -m tests.sizes` prints all of them, and what has grown long. A part that is above its
    budget today may not grow."""
    over = [f"{s.part}: {s.lines} lines of {s.budget}" for s in sizes() if s.exceeds]
    assert not over, f"more than {TOLERANCE:.0%} above the budget\n" + "\n".join(over)


def test_every_line_is_counted_once():
    counted = {size.part: size.lines for size in sizes()}
    assert counted.keys() == {*BUDGETS, "tests"}, "every folder is a part or belongs to the core"
    files = [path for path in project_files() if path.suffix == ".py"]
    assert sum(counted.values()) == sum(len((ROOT / p).read_text().splitlines()) for p in files)
    assert part_of(pathlib.Path("train.py")) == part_of(pathlib.Path("model/mla.py")) == "core"
    assert Size("other", 8200, 8000).exceeds
    assert not Size("other", 8100, 8000).exceeds


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


def classes_in(annotation: ast.expr | None, known: frozenset[str]) -> set[str]:
    """Configurations that an annotation speaks of; a tuple or list of them counts."""
    names = re.findall(r"\w+", ast.unparse(annotation)) if annotation else ()
    return known.intersection(names)


class Reader(ast.NodeVisitor):
    """Finds which fields of which configuration a module reads.

    A value's class is known from the annotation of a parameter, from a call of the class, or from a
    name that was assigned or looped over. Any other value, `self.train` or `run.train`, counts for
    the configurations that a field or function of that name is annotated with.
    """

    def __init__(self, known: frozenset[str], by_name: dict[str, set[str]]):
        self.known, self.by_name = known, by_name
        self.scope: dict[str, set[str]] = {}
        self.found: set[tuple[str, str]] = set()

    def classes(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name) and node.id in self.scope:
            return self.scope[node.id]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in self.known:
                return {name}
            return self.classes(node.args[0] if name == "dataclasses.replace" else node.func)
        if isinstance(node, ast.IfExp):
            return self.classes(node.body) | self.classes(node.orelse)
        if isinstance(node, ast.Subscript):
            return self.classes(node.value)
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        return self.by_name.get(name.lstrip("_"), set())

    def bind(self, target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, part in zip(target.elts, value.elts, strict=False):
                self.bind(name, part)
        elif isinstance(target, ast.Name) and value is not None:
            self.scope[target.id] = self.classes(value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.scope = self.scope, dict(self.scope)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            if argument.annotation:
                self.scope[argument.arg] = classes_in(argument.annotation, self.known)
        self.generic_visit(node)
        self.scope = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehensions(self, node) -> None:
        for generator in node.generators:
            self.bind(generator.target, generator.iter)
        over_axes = ast.unparse(node.generators[0].iter) == "AXES"
        if over_axes and "getattr(" in ast.unparse(node):
            self.found |= {("MeshConfig", axis) for axis in mesh_axes()}
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehensions

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found |= {(owner, node.attr) for owner in self.classes(node.value)}
        self.generic_visit(node)


@functools.cache
def annotated_names() -> dict[str, set[str]]:
    """Configurations by the names of the fields that hold and the functions that return them."""
    known = config_names()
    found: dict[str, set[str]] = {}
    for path in product_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name.lstrip("_"), set()).update(
                    classes_in(node.returns, known)
                )
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.AnnAssign):
                    name = ast.unparse(part.target).lstrip("_")
                    found.setdefault(name, set()).update(classes_in(part.annotation, known))
    return found


def config_names() -> frozenset[str]:
    return frozenset(node.name for _, node in config_classes())


def fields_read(module: ast.Module) -> set[tuple[str, str]]:
    """(class, field) of every configuration that a module reads."""
    reader = Reader(config_names(), annotated_names())
    reader.visit(module)
    return reader.found


def test_every_config_field_is_read():
    """Of its own class, by the program itself: by no config file, no bench and no test."""
    idle = {path for path, _ in config_classes()}
    readers = [
        p for p in product_files() if p not in idle and p.parts[0] not in ("configs", "bench")
    ]
    read = set().union(*(fields_read(tree(path)) for path in readers))
    fields = [
        (node.name, ast.unparse(statement.target))
        for _, node in config_classes()
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    ]
    assert len(fields) > 50, "the search for fields no longer finds them"
    unread = [f"{owner}.{name}" for owner, name in fields if (owner, name) not in read]
    assert not unread, "fields that nothing reads\n" + "\n".join(unread)


@pytest.mark.parametrize(
    ("source", "owner"),
    [
        ("def f(c: TrainConfig): return c.steps", "TrainConfig"),
        ("x = command.run.train.steps", "TrainConfig"),
        ("class A:\n  def f(self): return self._train.steps", "TrainConfig"),
        ("t = dataclasses.replace(run.train, seed=1)\nx = t.steps", "TrainConfig"),
        ("def f(o: TrainConfig | None):\n  for s in [1]: g(lambda: o.steps)", "TrainConfig"),
        ("x = schedule.steps", None),
        ("run.train.steps = 3", None),
        ("def f(train): return DataConfig().steps", "DataConfig"),
        ("def f(train: Schedule): return train.steps", None),
    ],
)
def test_a_read_counts_for_its_own_class(source, owner):
    assert fields_read(ast.parse(source)) & {(name, "steps") for name in config_names()} == (
        {(owner, "steps")} if owner else set()
    )


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
    kernels, cuda = locked("requirements-gpu-kernels.lock"), locked("requirements-cuda13.lock")
    for one, other in itertools.combinations((base, dev, kernels, cuda), 2):
        assert not one.keys() & other.keys()
    for requirements, versions in [
        (project["dependencies"], base),
        (PYPROJECT["build-system"]["requires"], base),
        (project["optional-dependencies"]["dev"], base | dev),
        (project["optional-dependencies"]["gpu-kernels"], kernels),
        (project["optional-dependencies"]["gpu-compiler"], cuda),
    ]:
        for requirement in map(Requirement, requirements):
            version = versions.get(canonicalize_name(requirement.name))
            assert version, f"{requirement} is not locked"
            assert version in requirement.specifier, f"{requirement}, but {version} is locked"
