"""What the documents name exists: files, functions, targets, modules, options; --help answers."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

MADE_BY_RUNS = ("runs/", "cache/", ".venv")
"""Paths that docs may name although a fresh checkout has none of them."""

EXTENSIONS = ("YarnConfig", "BandsConfig")
"""Of the context; a preset has one of them or none."""
FILE_NAME = re.compile(r"[\w./*-]+\.(py|md|toml|lock|yaml)|Makefile|\.ci/run")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


class Text(NamedTuple):
    """A Markdown file in its three kinds of content."""

    prose: str
    shell: list[str]
    """Fenced bash blocks."""
    listings: list[str]
    """Fenced blocks without a language, such as file maps."""


def read(path: pathlib.Path) -> Text:
    source = path.read_text()
    blocks = FENCE.findall(source)
    return Text(
        prose=FENCE.sub("", source),
        shell=[body for language, body in blocks if language == "bash"],
        listings=[body for language, body in blocks if language in ("", "text")],
    )


# ---- paths and functions ------------------------------------------------------------------------


def looks_like_path(token: str) -> bool:
    """A file by its extension, or something inside a folder of this project."""
    if token.startswith(MADE_BY_RUNS) or re.search(r"[<>{}$=(]|\.\.\.|://", token):
        return False
    if FILE_NAME.fullmatch(token):
        return True
    folder, slash, _ = token.partition("/")
    return (
        bool(slash) and re.fullmatch(r"[\w./*-]+", token) is not None and (ROOT / folder).is_dir()
    )


def find(token: str, beside: pathlib.Path) -> list[pathlib.Path]:
    """Files a path may mean: from the root, from the document, or by its name alone anywhere."""
    for folder in (ROOT, beside.parent):
        if found := list(folder.glob(token.rstrip("/"))) if token.strip("./") else [folder]:
            return found
    if "/" in token:
        return []
    folders = [ROOT / entry for entry in os.listdir(ROOT) if not entry.startswith(".")]
    return [path for folder in folders if folder.is_dir() for path in folder.rglob(token)]


@functools.cache
def names_in(path: pathlib.Path) -> frozenset[str]:
    """Functions, classes, `Class.method`s and assigned names of a Python file, at any depth."""
    names = set()

    def visit(node: ast.AST, prefix: str):
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.update((child.name, f"{prefix}{child.name}"))
                inner = f"{child.name}."
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                names.update((child.id, f"{prefix}{child.id}"))
            visit(child, inner)

    visit(ast.parse(path.read_text()), "")
    return frozenset(names)


def broken_references(doc: pathlib.Path, text: Text) -> list[str]:
    """Paths, and `file.py:name` references, that lead nowhere."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text.prose)
    quoted = re.findall(r"`([^`\s]+)`", text.prose)
    listed = [
        word for block in text.listings for word in block.split() if FILE_NAME.fullmatch(word)
    ]
    broken = []
    for link in links:
        if "://" not in link and not link.startswith("mailto:") and not find(link, doc):
            broken.append(link)
    for token in quoted + listed:
        path, _, name = token.partition(":")
        if not looks_like_path(path):
            continue
        files = find(path, doc)
        known = [
            file for file in files if file.suffix != ".py" or not name or name in names_in(file)
        ]
        if not known:
            broken.append(token)
    return broken


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_paths_and_functions_exist(doc):
    broken = broken_references(doc, read(doc))
    assert not broken, f"{doc.name} names what is not there: {', '.join(broken)}"


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("`model/config.py`, `model/`, `configs/*.py`, [x](model/config.py#top)", []),
        ("`model/config.py:ModelConfig.qk_head_dim` and `conftest.py`", []),
        ("`train/loss`, `runs/tiny/log.py`, `moe/router/bias`, `--option`, <https://a.b/c.py>", []),
        ("`model/no_such.py` [y](no_such.md)", ["no_such.md", "model/no_such.py"]),
        ("`model/config.py:NoSuch`", ["model/config.py:NoSuch"]),
        ("`model/no_such/`", ["model/no_such/"]),
        ("```\nmodel/no_such.py  the idea\n```\n", ["model/no_such.py"]),
    ],
)
def test_broken_references_are_found(tmp_path, source, broken):
    doc = tmp_path / "doc.md"
    doc.write_text(source)
    assert broken_references(doc, read(doc)) == broken


# ---- commands -----------------------------------------------------------------------------------


def commands(block: str) -> list[list[str]]:
    """Commands of a bash block as words; leading VAR=value words are left out."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        command: list[str] = []
        for word in [*words, ";"]:
            if word.rstrip(";") in ("", "&&", "||", "|", "&"):
                found += [command] if command else []
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word.rstrip(";"))
    return found


@functools.cache
def make_targets() -> frozenset[str]:
    makefile = (ROOT / "Makefile").read_text()
    return frozenset(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))


@functools.cache
def help_text(script: str, preset: str = "", command: str = "") -> str:
    """What `script [command] --help` prints, for a preset where the options depend on one."""
    chosen = [*([command] if command else []), *(["--config", preset] if preset else [])]
    result = subprocess.run(
        [sys.executable, script, *chosen, "--help"],
        cwd=ROOT,
        # tyro sets wider help in two columns, which cannot be read line by line
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{script} --help failed:\n{result.stderr}"
    return result.stdout


def is_installed_or_here(module: str) -> bool:
    """Whether `python -m module` finds something to run from the root of the checkout."""
    path = ROOT.joinpath(*module.split("."))
    if (ROOT / module.split(".")[0]).is_dir():
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(module) is not None


def unknown_parts(command: list[str]) -> list[str]:
    """Targets, files, modules and options of a command that do not exist.

    Only make and python are read; options are those of entry points.
    """
    program, arguments = command[0], command[1:]
    if program == "make":
        words = [word for word in arguments if "=" not in word and not word.startswith("-")]
        return [f"make {word}" for word in words if word not in make_targets()]
    if not re.fullmatch(r"(.*/)?python[\d.]*", program) or not arguments:
        return []
    script = arguments[0]
    if script == "-m":
        module = arguments[1]
        return [] if is_installed_or_here(module) else [f"python -m {module}"]
    if not script.endswith(".py"):
        return []
    if not (ROOT / script).exists():
        return [script]
    if "/" in script:  # a tool, not an entry point
        return []
    options = [word for word in arguments if word.startswith("--")]
    preset = ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word.startswith("--config"):
            preset = word.partition("=")[2] or following
    words = arguments[1:2]
    command_word = words[0] if words and words[0].isalpha() else ""
    help_of = help_text(script, preset, command_word) if options else ""
    known = set(re.findall(r"--[\w.-]+", help_of))
    return [
        f"{script} {option}"
        for option in options
        if option.split("=")[0].replace("_", "-") not in known
    ]


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_commands_exist(doc):
    text = read(doc)
    quoted = re.findall(r"`(python -m [^`]+)`", text.prose)
    unknown = [
        part
        for block in [*text.shell, *quoted]
        for command in commands(block)
        for part in unknown_parts(command)
    ]
    assert not unknown, f"{doc.name} types what does not exist: {', '.join(unknown)}"


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("make test && make no-such  # why", ["make no-such"]),
        ("make train CONFIG=tiny", []),
        ("JAX_PLATFORMS=cpu python no_such.py --help | tail", ["no_such.py"]),
        (".venv/bin/python no_such.py \\\n  --steps 3", ["no_such.py"]),
        ("python -m bench.step --rounds 5; python -m pip install x", []),
        ("python -m bench.no_such --rounds 5", ["python -m bench.no_such"]),
        ("python -m sharding", ["python -m sharding"]),
        ("git clone somewhere; pip install x", []),
    ],
)
def test_unknown_commands_are_found(line, unknown):
    assert [part for command in commands(line) for part in unknown_parts(command)] == unknown


# ---- --help -------------------------------------------------------------------------------------


def squeezed(text: str) -> str:
    """Without white space and frames, so that line breaks do not matter."""
    return re.sub(r"[\s│─╭╮╰╯]", "", text)


def field_texts(files: list[pathlib.Path]) -> list[tuple[str, str]]:
    """(field, docstring) of every config field in `files` whose option every preset has.

    Schedules and sources (tuples) and extensions (None unless a preset has one) show the
    options of their elements, as many as a preset has.
    """
    found = []
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name not in EXTENSIONS:
                for field, text in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                        if ast.unparse(field.annotation).startswith(
                            ("tuple[", *(f"{name} |" for name in EXTENSIONS))
                        ):
                            continue
                        assert isinstance(text.value, ast.Constant)
                        name = f"{node.name}.{ast.unparse(field.target)}"
                        found.append((name, str(text.value.value)))
    return found


def test_help_imports_nothing_heavy():
    """Of what takes seconds to import: `--help` answers at once, on a busy machine too."""
    for script in ("train.py", "generate.py", "convert.py"):
        command = [sys.executable, "-X", "importtime", script, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "argparse" in imported, "the list of imports is no longer read"
        heavy = {"jax", "flax", "optax", "orbax", "grain", "tensorstore", "tokenizers", "sympy"}
        assert not heavy & imported, f"{script} --help imports {heavy & imported}"


def test_train_help_is_complete():
    """With a preset's own model: tiny's, and that of one with eyes."""
    printed = squeezed(help_text("train.py", "tiny")) + squeezed(
        help_text("train.py", "janus_tiny")
    )
    files = [path for path in ROOT.glob("*/config.py") if path.parent.name != "generation"]
    texts = field_texts([*files, ROOT / "configs/schema.py"])
    missing = [name for name, text in texts if squeezed(text) not in printed]
    assert not missing, f"not explained by train.py --help: {', '.join(missing)}"


def test_generate_help_is_complete():
    printed = squeezed(help_text("generate.py"))
    texts = field_texts([ROOT / "generation/config.py", ROOT / "sharding/config.py"])
    missing = [name for name, text in texts if squeezed(text) not in printed]
    assert not missing, f"not explained by generate.py --help: {', '.join(missing)}"
