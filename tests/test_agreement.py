"""What processes of a run compare at the start, and what they say of a difference."""

import json
import types

import jax
import pytest

from configs.command import parse
from runtime import agreement
from runtime.agreement import agree, code_facts, option_facts
from runtime.devices import check_devices
from train import OWN_OPTIONS


def in_two(monkeypatch, index: int, first: dict, second: dict) -> str:
    """What process `index` of two raises when they have these facts; "" when they agree."""
    said = {}

    def exchange(name: str, value: str) -> list[str]:
        both = [json.dumps(first), ""] if name.endswith("of process 0") else said["lines"]
        return [value if i == index else other for i, other in enumerate(both)]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "exchange", exchange)
    # What the other one says: of process 1, its line; process 0 never differs from itself.
    unlike = [f"{k}: {first.get(k, 'nothing')} in process 0, {second.get(k, 'nothing')} in process 1"
              for k in sorted({*first, *second}) if first.get(k) != second.get(k)]  # fmt: skip
    said["lines"] = ["", "\n  ".join(unlike)]
    monkeypatch.setattr(jax, "process_index", lambda: index)
    try:
        agree("options", lambda: (first, second)[index])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("index", [0, 1])
def test_a_difference_is_named_on_every_process(monkeypatch, index):
    same = {"--seed": "0", "--config": "tiny"}
    assert in_two(monkeypatch, index, same, dict(same)) == ""
    message = in_two(monkeypatch, index, same, same | {"--seed": "1", "--more": "x"})
    assert "differ in their options" in message
    assert "--seed: 0 in process 0, 1 in process 1" in message
    assert "--more: nothing in process 0, x in process 1" in message
    assert "--config" not in message


def test_many_differences_are_cut(monkeypatch):
    first, second = ({f"file{i:02}": f"{i + j}" for i in range(30)} for j in range(2))
    message = in_two(monkeypatch, 1, first, second)
    assert "file07" in message
    assert "file08" not in message
    assert "... and 22 more" in message


def options(*more: str) -> dict[str, str]:
    return option_facts(parse(list(more)), ("run",), OWN_OPTIONS)


def test_options_are_named_as_typed():
    one, other = options(), options("--train.learning-rate.0.value", "1", "--sample-prompt", "x")
    unlike = {name for name in one.keys() | other if one.get(name) != other.get(name)}
    assert unlike == {"--train.learning-rate.0.value", "--sample-prompt"}


def test_what_a_process_may_have_of_its_own():
    own = ["--run-dir", "a", "--data.cache-dir", "b", "--process-id", "1", "--coordinator", "h:1"]
    assert options(*own, "--profile", "1:2") == options()


@pytest.mark.parametrize("suffix", ["", ":reward=0.5"])
def test_a_file_counts_with_its_content(tmp_path, suffix):
    """Also one that holds a reward, FILE.py:FUNCTION=WEIGHT."""
    file = tmp_path / "judge.py"
    file.write_text("a")
    before = options("--rl.rewards", f"{file}{suffix}")
    file.write_text("b")
    after = options("--rl.rewards", f"{file}{suffix}")
    assert {name for name in before if before[name] != after[name]} == {"--rl.rewards.0"}


def test_every_source_file_counts(tmp_path, monkeypatch):
    facts = code_facts()
    assert {"train.py", "training/step.py", "model/router.py", "rl/verdict/rules.py"} <= set(facts)
    assert {"jax", "numpy", "Python", "XLA_FLAGS", "jax_enable_x64"} <= set(facts)
    assert not any(name.startswith(("tests/", ".venv", "bench/")) for name in facts)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").touch()
    monkeypatch.setattr(agreement, "ROOT", tmp_path)
    source = tmp_path / "model" / "router.py"
    digests = set()
    for text in ("a", "b"):
        source.write_text(text)
        digests.add(code_facts()["model/router.py"])
    assert len(digests) == 2


def test_large_files_count_with_size_start_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "WHOLE", 8)
    file, digests = tmp_path / "x", set()
    for content in (b"abcdefghijkl", b"Xbcdefghijkl", b"abcdefghijkX", b"abcdefghijklm"):
        file.write_bytes(content)
        digests.add(agreement._digest(file))
    assert len(digests) == 4


@pytest.mark.parametrize(("counts", "fine"), [((2, 2), True), ((2, 1), False), ((1, 2, 2), False)])
def test_processes_have_as_many_devices(monkeypatch, counts, fine):
    devices = [
        types.SimpleNamespace(process_index=i) for i, n in enumerate(counts) for _ in range(n)
    ]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    if fine:
        check_devices()
        return
    with pytest.raises(ValueError, match=rf"process {counts.index(1)} has 1, the others 2"):
        check_devices()
