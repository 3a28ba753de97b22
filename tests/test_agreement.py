"""What processes of a run compare at the start, and what they say of a difference."""

import threading
import types

import jax
import pytest

from configs.command import parse
from runtime import agreement
from runtime.agreement import agree, code_facts, option_facts
from runtime.devices import check_devices
from train import OWN_OPTIONS


def apart(monkeypatch, *facts: dict[str, str]) -> list[str]:
    """What processes with these facts, here threads, raise; "" of one that goes on."""
    barrier, said, raised = threading.Barrier(len(facts)), {}, [""] * len(facts)

    def me() -> int:
        return int(threading.current_thread().name)

    def exchange(name: str, value: str) -> list[str]:
        said[name, me()] = value
        barrier.wait(timeout=10)
        return [said[name, i] for i in range(len(facts))]

    def one() -> None:
        try:
            agree("options", lambda: facts[me()])
        except ValueError as error:
            raised[me()] = str(error)

    monkeypatch.setattr(jax, "process_count", lambda: len(facts))
    monkeypatch.setattr(jax, "process_index", me)
    monkeypatch.setattr(agreement, "exchange", exchange)
    threads = [threading.Thread(target=one, name=str(i)) for i in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_a_difference_is_named_on_every_process(monkeypatch):
    same = {"--seed": "0", "--config": "tiny"}
    assert apart(monkeypatch, same, dict(same)) == ["", ""]
    messages = apart(monkeypatch, same, same, same | {"--seed": "1", "--more": "x"})
    assert len(set(messages)) == 1
    assert "differ in their options" in messages[0]
    assert "--seed: 0 in process 0, 1 in process 2" in messages[0]
    assert "--more: nothing in process 0, x in process 2" in messages[0]
    assert "--config" not in messages[0]


def test_many_differences_are_cut(monkeypatch):
    first, second = ({f"file{i:02}": f"{i + j}" for i in range(30)} for j in range(2))
    message = apart(monkeypatch, first, second)[0]
    assert "file07" in message
    assert "file08" not in message
    assert "... and 22 more" in message


def test_many_processes_that_differ_are_counted(monkeypatch):
    message = apart(monkeypatch, {"--seed": "0"}, *({"--seed": f"{i}"} for i in range(1, 5)))[0]
    assert "1 in process 1" in message
    assert "... and 3 more processes differ" in message


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
