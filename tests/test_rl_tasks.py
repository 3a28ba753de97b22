"""Tasks with verifiers: what they ask, what their corpus shows, and what no answer may do to them;
prompts from a user's file."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import NoTokenError
from rl.config import TaskConfig
from rl.corpus import configured_task, sample_prompt
from rl.problems import Problem, held_out, split_problems
from rl.prompt_files import final_answer, read_prompts
from rl.tasks import TASKS, make_task
from rl.tasks.characters import character_tokenizer
from rl.tasks.permutations import MOD10, S5
from rl.tasks.search import FAILURES, accuracy_by_tries, census
from rl.tasks.task import END, summary

VARIANTS = {
    "permutations": make_task("permutations"),
    "permutations, two scripts": make_task("permutations", scripts=2, shortest=3),
    "permutations, mod 10": make_task("permutations", rules="mod10", length=6, share_of_chains=1.0),
    "search": make_task("search"),
    "subset sum": make_task("search", pick=0, digits=6),
}
every_task = pytest.mark.parametrize("task", VARIANTS.values(), ids=VARIANTS.keys())


def some(task, count, seed=5):
    return [task.prompt(seed, index) for index in range(count)]


def demonstrated(task, count, seed=5):
    rng = np.random.default_rng(seed)
    return [(problem, task.demonstrate(problem, rng)) for problem in some(task, count, seed)]


# ---- every task ---------------------------------------------------------------------------------


def test_every_task_is_tried():
    assert {type(task) for task in VARIANTS.values()} == set(TASKS.values())


@every_task
def test_prompts_depend_on_seed_side_and_index_alone(task):
    assert task.prompt(3, 7) == task.prompt(3, 7)
    forward = [task.prompt(3, i) for i in range(6)]
    assert forward == [task.prompt(3, i) for i in reversed(range(6))][::-1]
    assert len({problem.key for problem in forward}) > 3
    assert forward != [task.prompt(4, i) for i in range(6)]
    assert forward != [task.prompt(3, i, "held_out") for i in range(6)]
    lines = list(itertools.islice(task.corpus(3), 6))
    assert lines[4:] == list(itertools.islice(task.corpus(3, start=4), 2))
    assert lines != list(itertools.islice(task.corpus(4), 6))


@every_task
def test_no_problem_is_on_both_sides(task):
    train = {problem.key for problem in some(task, 150)}
    test = {problem.key for problem in task.distinct_prompts(1, 60)}
    assert len(test) == 60
    assert not train & test
    assert {problem.key for problem in task.distinct_prompts(1, 60, "train")}.isdisjoint(test)


def test_the_corpus_holds_no_held_out_problem():
    """All problems of one move are drawn here."""
    task = make_task("permutations", length=1, held_out=0.4)
    written = {line.partition(":")[0] + ":" for line in itertools.islice(task.corpus(0), 2000)}
    everything = [f"{state}{move}:" for state in range(5) for move in S5]
    assert written == {text for text in everything if not held_out(Problem(text, {}), 0.4)}


@every_task
def test_problems_are_json_and_pure_data(task):
    for problem in some(task, 5):
        again = Problem(**json.loads(json.dumps(dataclasses.asdict(problem))))
        assert again == problem
        assert problem.task == task.name


@every_task
def test_vocabulary_covers_prompts_and_corpus(task):
    assert len(set(task.vocabulary)) == len(task.vocabulary)
    assert task.vocabulary[-1] == END
    tokenizer = character_tokenizer(task.vocabulary)
    for line in itertools.islice(task.corpus(0), 100):
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == line
        assert ids[-1] == tokenizer.vocab_size - 1
        assert line.endswith(END)
        assert line.count(END) == 1
        assert len(ids) == len(line)


def test_character_tokenizer_refuses_what_it_does_not_know():
    tokenizer = character_tokenizer(["a", "b", "<t>", "a"])
    assert tokenizer.encode("ab<t>").tolist() == [3, 4, 5]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    for text in ("ac", "<t", "\ud7ff"):
        with pytest.raises(NoTokenError, match="no token for"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="entry is ''"):
        character_tokenizer(["a", ""])


@every_task
@given(data=st.data())
def test_no_answer_breaks_a_verifier(task, data):
    problem = task.prompt(0, data.draw(st.integers(0, 20)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shown = task.demonstrate(problem, rng)
    at = data.draw(st.integers(0, len(shown)))
    own = st.text(st.sampled_from("".join(task.vocabulary)))
    mutated = st.builds(
        lambda new, cut: shown[:at] + new + shown[at + cut :], own, st.integers(0, 3)
    )
    text = data.draw(st.one_of(st.text(), own, mutated))
    found = task.inspect(problem, text)
    assert isinstance(found["correct"], bool)
    assert isinstance(found["format_ok"], bool)
    assert 0 <= found["steps_right"] <= found["steps"]
    assert task.verify(problem, text) == float(found["correct"])
    if "failure" in found:
        assert bool(found["failure"]) != found["correct"]
    if not text.endswith(END):
        assert task.verify(problem, text + END) == float(found["correct"])


@every_task
def test_no_answer_is_slow(task):
    problem, shown = demonstrated(task, 1)[0]
    n = 100_000
    pieces = ["1", "(", "-", "9**", ">", "=", ",", "y", "<answer>", "<think>", "a1", "071=08n", END,
              "1+1=2;", "1+1=02,", "١", "(1)", "1*", " ", "</answer>"]  # fmt: skip
    texts = [piece * (n // len(piece)) for piece in pieces]
    texts += ["<think>" + t + "</think><answer>" + t + "</answer>" for t in texts]
    start = time.process_time()
    for text in texts:
        assert task.verify(problem, text) == 0.0
    task.verify(problem, shown * (n // len(shown)))
    assert time.process_time() - start < 0.1 * len(texts)


def test_options_are_checked():
    with pytest.raises(ValueError, match="did you mean 'search'"):
        make_task("serch")
    with pytest.raises(ValueError, match="permutations is 'nois'; did you mean 'noise'"):
        make_task("permutations", nois=0.1)
    for name, wrong in [
        ("permutations", {"noise": 1.5}),
        ("permutations", {"noise": float("nan")}),
        ("permutations", {"length": 0}),
        ("permutations", {"rules": "s6"}),
        ("permutations", {"held_out": 1.0}),
        ("search", {"pick": 5}),
        ("search", {"digits": 11}),
    ]:
        with pytest.raises(ValueError, match=f"task {name}: {next(iter(wrong))}( is |=)"):
            make_task(name, **wrong)


def test_an_empty_side_is_an_error():
    with pytest.raises(ValueError, match="side 'held_out'"):
        make_task("search", held_out=0.0).prompt(0, 0, "held_out")
    with pytest.raises(ValueError, match="different problems"):
        make_task("permutations", length=1).distinct_prompts(0, 30)


def test_summary_is_of_all_answers():
    items = [
        {"correct": True, "format_ok": True, "steps": 3, "steps_right": 3},
        {"correct": False, "format_ok": True, "steps": 1, "steps_right": 0},
    ]
    assert summary(items) == {"accuracy": 0.5, "format": 1.0, "step_accuracy": 0.75, "steps": 2.0}
    assert np.isnan(summary([{**items[0], "steps": 0, "steps_right": 0}])["step_accuracy"])
    with pytest.raises(ValueError, match="at least one"):
        summary([])


# ---- permutations -------------------------------------------------------------------------------


def test_moves_generate_every_permutation_of_five():
    group, edge = set(), {(0, 1, 2, 3, 4)}
    while edge:
        group |= edge
        edge = {tuple(move[x] for x in p) for p in edge for move in S5.values()} - group
    assert len(group) == 120
    assert len(set(S5.values())) == 10


def test_moves_modulo_ten():
    assert len(MOD10) == 30
    for move, images in MOD10.items():
        wanted = {"+": np.add, "-": np.subtract, "*": np.multiply}[move[0]]
        assert list(images) == [wanted(x, int(move[1])) % 10 for x in range(10)]


@pytest.mark.parametrize("rules", ["s5", "mod10"])
def test_the_answer_is_the_last_state(rules):
    task = make_task("permutations", rules=rules, share_of_chains=0.0)
    table = S5 if rules == "s5" else MOD10
    width = 1 if rules == "s5" else 2
    for problem, shown in demonstrated(task, 50):
        state, moves = int(problem.prompt[0]), problem.prompt[1:-1]
        for at in range(0, len(moves), width):
            state = table[moves[at : at + width]][state]
        assert shown == f">{state}"
        wrong = [other for other in range(task.states) if other != state]
        assert task.verify(problem, f">{state}") == 1
        assert not any(task.verify(problem, f">{other}") for other in wrong)


def test_corpus_of_chains_has_the_shares_asked_for():
    """Shares of 1500 draws; four standard deviations are .047 and .01."""
    task = make_task("permutations")
    shown = demonstrated(task, 1500)
    found = [task.inspect(problem, text) for problem, text in shown]
    assert all(item["format_ok"] for item in found)
    chains = [(item, text) for item, (_, text) in zip(found, shown, strict=True) if item["steps"]]
    assert abs(len(chains) / 1500 - 0.3) < 0.047
    assert all(item["steps"] == 10 and len(text) == 22 for item, text in chains)
    assert abs(summary([item for item, _ in chains])["step_accuracy"] - 0.94) < 0.01
    assert all(text[-1] == text[-3] for _, text in chains), "a chain ends with its own last state"
    assert all(item["correct"] for item in found if not item["steps"])
    assert all(item["correct"] for item in found if item["steps_right"] == 10)
    # One or more wrong steps: right by chance only, in about a fifth.
    erred = [item["correct"] for item, _ in chains if item["steps_right"] < 10]
    assert 0.05 < np.mean(erred) < 0.35


def test_steps_are_judged_from_the_state_written_before():
    task = make_task("permutations", length=3)
    problem = Problem("0abc:", {"start": 0, "moves": ["a", "b", "c"], "final": 3}, "permutations")
    # a: 04123, b: 30142, c: 42031; from 0: a0, b3, c3.
    for text, wanted in {
        "a0b3c3>3": (True, True, 3, 3),
        "a0b3c3>3\n": (True, True, 3, 3),
        ">3": (True, True, 0, 0),
        "a1b0c4>4": (False, True, 3, 2),  # one wrong state, then consistent
        "a1b0c4>3": (True, True, 3, 2),
        "a0b3>3": (True, False, 2, 2),
        "a0b3c3c1>3": (True, False, 4, 3),
        "a0c4b2>3": (True, False, 3, 1),  # not the moves asked for
        "a0b3x3>3": (True, False, 2, 2),
        "a0b3c3": (False, False, 3, 3),
        "a0b3c>3": (True, False, 2, 2),
        "a0b3c3x>3": (True, False, 3, 3),
        "a0b3c3>33": (False, False, 3, 3),
        "a0b3c3>3>3": (False, False, 3, 3),
        "a0b3c3>": (False, False, 3, 3),
        "a٠>3": (True, False, 0, 0),
        "": (False, False, 0, 0),
    }.items():
        found = task.inspect(problem, text)
        got = (found["correct"], found["format_ok"], found["steps"], found["steps_right"])
        assert got == wanted, text


# ---- search -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pick", [3, 0])
def test_solutions_are_all_choices_with_the_sum(pick):
    task = make_task("search", pick=pick)
    for problem in some(task, 30):
        digits, target = re.fullmatch(r"(\d{5}),(\d\d):", problem.prompt).groups()
        sizes = [pick] if pick else [2, 3, 4, 5]
        every = [c for n in sizes for c in itertools.combinations(digits, n)]
        wanted = {"".join(c) for c in every if sum(map(int, c)) == int(target)}
        assert set(problem.answer["solutions"]) == wanted != set()
        assert len(set(digits)) == 5
        for choice in map("".join, every):
            assert task.verify(problem, f">{choice[::-1]}") == (choice in wanted)


def test_another_order_of_the_digits_is_the_same_problem():
    seen = {}
    for problem in some(make_task("search", held_out=0.0), 600):
        digits, _, target = problem.prompt.partition(",")
        ordered = (sorted(digits), target)
        assert seen.setdefault(problem.key, ordered) == ordered
    assert len(seen) == len(set(map(str, seen.values()))) < 570


def test_failures_of_a_search_by_name():
    task = make_task("search", tries=3)
    answer = {"digits": "30791", "target": 13, "solutions": ["391"]}
    problem = Problem("30791,13:", answer, "search")
    for text, failure, tries, duplicates in [
        ("391=13y>391", "", 1, 0),
        ("071=08n391=13y>391", "", 2, 0),
        (">391", "", 0, 0),
        ("391=13n>391", "", 1, 0),  # a wrong check does no harm here
        (">-", "gave_up", 0, 0),
        ("071=08n>-", "gave_up", 1, 0),
        ("071=08y>071", "wrong_check", 1, 0),
        ("071=08y>170", "wrong_check", 1, 0),
        ("071=13y>071", "wrong_sum", 1, 0),
        ("071=12y>071", "wrong_check", 1, 0),  # wrong sum, and not even the target
        ("071=13n>071", "wrong_answer", 1, 0),
        ("071=08n>790", "wrong_answer", 1, 0),
        ("071=08y>790", "wrong_answer", 1, 0),
        (">071", "wrong_answer", 0, 0),
        ("071=08n170=08n079=16n>-", "budget", 3, 1),
        ("071=08n170=08n079=16n391=13y>391", "budget", 4, 1),
        ("071=08n071=0", "budget", 1, 0),
        ("071=08n07", "budget", 1, 0),
        ("071=08n>3", "budget", 1, 0),
        ("071=08n", "budget", 1, 0),
        ("071=08n\n", "format", 1, 0),  # it ended, and without an answer
        ("", "format", 0, 0),
        ("\n", "format", 0, 0),
        ("072=09n>-", "format", 1, 0),  # 2 is not among the digits
        ("077=14n>-", "format", 1, 0),
        ("71=08n>-", "format", 1, 0),
        (">39", "budget", 0, 0),
        (">3911", "format", 0, 0),
        ("391=13y>391 ", "format", 1, 0),
        ("391=13y391", "budget", 1, 0),
        ("text", "format", 0, 0),
    ]:
        found = task.inspect(problem, text)
        assert (found["failure"], found["tries"], found["duplicates"]) == (
            failure, tries, duplicates), text  # fmt: skip
    found = task.inspect(problem, "071=08n079=15n391=13n901=10y>901")
    assert (found["steps_right"], found["sums_right"], found["checks_right"]) == (1, 3, 2)


def test_corpus_of_searches_has_the_shares_asked_for():
    """Four standard deviations of each share, and the chance of a random triple computed exactly
    from the prompts."""
    task = make_task("search")
    shown = demonstrated(task, 2500)
    found = [task.inspect(problem, text) for problem, text in shown]
    tries = sum(item["tries"] for item in found)
    counted = census(found)
    assert abs(counted["sum_accuracy"] - 0.992) < 4 * (0.992 * 0.008 / tries) ** 0.5
    assert abs(counted["check_accuracy"] - 0.966) < 4 * (0.966 * 0.034 / tries) ** 0.5
    assert sum(counted[kind] for kind in ("correct", *FAILURES)) == pytest.approx(1)
    assert counted["duplicate_tries"] == counted["format"] == counted["wrong_answer"] == 0
    first = [text[:3] in problem.answer["solutions"] for problem, text in shown]
    chance = np.mean([0.3 + 0.7 * len(problem.answer["solutions"]) / 10 for problem, _ in shown])
    assert abs(np.mean(first) - chance) < 4 * (0.25 / 2500) ** 0.5
    # After a first try that is not accepted, 35% give up.
    missed = [text for _, text in shown if text[6] == "n"]
    gave_up = [text[7:] == ">-" for text in missed]
    assert abs(np.mean(gave_up) - 0.35) < 4 * (0.35 * 0.65 / len(missed)) ** 0.5
    curve = accuracy_by_tries(found, 8)
    assert curve == sorted(curve)
    assert curve[-1] == counted["correct"]


def test_accuracy_by_tries_counts_correct_answers():
    items = [{"correct": c, "tries": n} for c, n in [(True, 0), (True, 2), (False, 1), (True, 3)]]
    assert accuracy_by_tries(items, 4) == [0.25, 0.5, 0.75, 0.75]
    with pytest.raises(ValueError, match="at least one"):
        accuracy_by_tries([], 4)
    with pytest.raises(ValueError, match="at least one"):
        census([])


# ---- splitting problems -------------------------------------------------------------------------


def test_split_keeps_order_and_grows_with_the_share():
    problems = [Problem(f"prompt {i}", {"answer": "1"}) for i in range(400)]
    train, kept = split_problems(problems, 0.2)
    assert 40 < len(kept) < 120
    assert train == [r for r in problems if r not in kept]
    assert kept == [r for r in problems if r in kept]
    assert {r.prompt for r in kept} < {r.prompt for r in split_problems(problems, 0.5)[1]}
    assert split_problems(problems[::-1], 0.2) == (train[::-1], kept[::-1])
    assert split_problems(problems, 0.0) == (problems, [])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.9])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_a_small_file_of_prompts_holds_out_one_problem_at_least(count, share):
    for first in range(20):
        problems = [Problem(f"{first} {i}", {}, name=f"{first} {i // 2}") for i in range(2 * count)]
        train, kept = split_problems(problems, share)
        assert train
        assert kept
        assert not {r.key for r in train} & {r.key for r in kept}  # both wordings on one side
        assert len(train) + len(kept) == 2 * count
    with pytest.raises(ValueError, match=r"2 prompts about 1 problem .*--rl\.held-out 0"):
        split_problems(problems[:2], share)


def test_a_share_that_would_take_all_problems_leaves_one():
    problems = [Problem(f"prompt {i}", {"answer": "1"}) for i in range(5)]
    train, kept = split_problems(problems, 0.9999)
    assert (len(train), len(kept)) == (1, 4)


def test_messages_are_split_by_their_content():
    one = Problem([{"role": "user", "content": "hi"}], {})
    same = Problem([{"content": "hi", "role": "user"}], {"answer": "other"})
    assert one.key == same.key != Problem([{"role": "user", "content": "ho"}], {}).key


# ---- prompts from a file ------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def make(*lines, end="\n"):
        path = tmp_path / "prompts.jsonl"
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        rows = [text if isinstance(text, bytes) else text.encode() for text in texts]
        path.write_bytes(end.encode().join(rows))
        return path

    return make


def test_every_form_of_prompt(write):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    path = write(
        {"prompt": "1+1=", "answer": 2},
        "",
        {"question": "Eggs?", "answer": "She sells 9 * 2 = <<9*2=18>>18.\n#### 1,018"},
        {"messages": talk, "answer": "4", "reward": "number", "level": 3},
        {"prompt": "Primes?", "answer": ["2", 3, 0.5], "kind": "set"},
        end="\r\n",
    )
    assert read_prompts(path) == [
        Problem("1+1=", {"answer": "2"}),
        Problem("Eggs?", {"answer": "1018", "solution": "She sells 9 * 2 = <<9*2=18>>18."}),
        Problem(talk, {"answer": "4", "level": 3}, "number"),
        Problem("Primes?", {"answer": ["2", "3", "0.5"]}, "set"),
    ]
    marked = write(b"\xef\xbb\xbf" + b'{"prompt": "x", "answer": "y"}')
    assert read_prompts(marked) == [Problem("x", {"answer": "y"})]
    packed = path.with_name("packed.jsonl.gz")
    packed.write_bytes(gzip.compress(marked.read_bytes()))
    assert read_prompts(packed) == [Problem("x", {"answer": "y"})]
    packed.write_bytes(packed.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"packed\.jsonl\.gz is cut or damaged"):
        read_prompts(packed)
    assert read_prompts(write({"prompt": "x"}), need_answers=False) == [Problem("x", {})]
    tests = [{"check": "assert f(1) == 2"}]
    path = write({"prompt": "x", "tests": tests, "kind": "code"})
    assert read_prompts(path) == [Problem("x", {"tests": tests}, "code")]


def test_a_check_of_the_problems_is_reported_by_line(write):
    def check(problem):
        if not problem.answer["answer"].isdecimal():
            raise ValueError(f"answer {problem.answer['answer']} is no whole number")

    path = write(*({"prompt": p, "answer": a} for p, a in [("a", "1"), ("b", "x"), ("c", "y")]))
    with pytest.raises(ValueError, match=r"2 of 3[^\n]*\n  line 2: answer x is[^\n]*\n  line 3: "):
        read_prompts(path, check=check)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("work\n#### 72", ("72", "work")),
        ("#### 1,234,567", ("1234567", "")),
        ("a #### 1 #### -2,000.50", ("-2000.50", "a #### 1")),
        ("#### $1,000", ("$1000", "")),
        ("#### 1,2,3", ("1,2,3", "")),
        ("#### 12,34", ("12,34", "")),
        ("#### x, y", ("x, y", "")),
    ],
)
def test_final_answers(text, wanted):
    assert final_answer(text) == wanted


BROKEN = {
    "{": "not JSON: Expecting property name",
    b'{"prompt": "\xff"}': "not UTF-8",
    "[1]": "holds a list, not an object",
    "null": "holds null",
    '{"prompt": "a", "prompt": "b", "answer": "1"}': "the field 'prompt' twice",
    '{"prompt": "a", "answer": NaN}': "NaN is no number",
    '{"prompt": "a", "answer": 1e999}': "not JSON compliant",
    '{"prompt": "a", "answer": ' + "9" * 200_000 + "}": "limit",
    '{"prompt": "\\ud800", "answer": "1"}': "surrogate",
    "[" * 100_000: "nested too deep",
    '{"prompt": "a"}': 'has neither "answer" nor "tests"; its fields are [\'prompt\']',
    '{"text": "a", "answer": "1"}': "has the fields ['answer', 'text']; give one of",
    '{"prompt": "a", "question": "b", "answer": "1"}': "both 'prompt' and 'question'",
    '{"prompt": 5, "answer": "1"}': '"prompt" is a number, not a text',
    '{"prompt": " ", "answer": "1"}': '"prompt" is an empty text',
    '{"prompt": "a", "answer": null}': '"answer" is null',
    '{"prompt": "a", "answer": true}': '"answer" is true or false',
    '{"prompt": "a", "answer": ""}': '"answer" is an empty text',
    '{"prompt": "a", "answer": []}': '"answer" is an empty list',
    '{"prompt": "a", "answer": [{}]}': 'an item of "answer" is an object',
    '{"question": "a", "answer": "5"}': 'has no "####"',
    '{"question": "a", "answer": "5 ####"}': 'nothing after "####"',
    '{"question": "a", "answer": ["5"]}': 'of a "question" is a list',
    '{"question": "a", "answer": "#### 5", "solution": "b"}': '"solution" would be replaced',
    '{"messages": "a", "answer": "1"}': '"messages" is a text',
    '{"messages": [], "answer": "1"}': "must end with a user message",
    '{"messages": [{"role": "user"}], "answer": "1"}': "content None is no text",
    '{"messages": [5], "answer": "1"}': "role must be one of",
    '{"messages": [{"role": "user", "content": "", "x": 1}], "answer": "1"}': "which mean",
    '{"messages": [{"role": "user", "content": ""}], "answer": "1"}': "message is an empty text",
    '{"prompt": "a", "answer": "1", "reward": 1}': '"reward" is a number, not a name',
    '{"prompt": "a", "answer": "1", "reward": ""}': '"reward" is empty',
    '{"prompt": "a", "answer": "1", "reward": "set", "kind": "x"}': "give one of them",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_lines_say_what_is_wrong(write, line):
    path = write({"prompt": "fine", "answer": "1"}, line)
    with pytest.raises(ValueError, match="1 of 2 lines cannot be used") as caught:
        read_prompts(path)
    assert f"  line 2: {BROKEN[line]}" in str(caught.value) or (
        str(caught.value).splitlines()[1].startswith("  line 2: ")
        and BROKEN[line] in str(caught.value).splitlines()[1]
    )


def test_all_broken_lines_are_counted_and_twenty_shown(write):
    path = write(*["{"] * 13, {"prompt": "a", "answer": "1"}, *["5"] * 12)
    with pytest.raises(ValueError, match="25 of 26 lines") as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    assert [int(line.split(":")[0].split()[1]) for line in lines[1:-1]] == [
        *range(1, 14), *range(15, 22)]  # fmt: skip
    assert lines[-1] == "  and 5 more"


def test_repeated_prompts(write):
    line = {"prompt": "a", "answer": "1"}
    problems = read_prompts(write(line, {"prompt": "b", "answer": "1"}, line, line))
    assert [problem.prompt for problem in problems] == ["a", "b"]
    with pytest.raises(ValueError, match="line 2: has the prompt of line 1, but another answer"):
        read_prompts(write(line, {"prompt": "a", "answer": "2"}))


def test_files_without_prompts(write, tmp_path):
    for path in (write(), write("", " ", "")):
        with pytest.raises(ValueError, match="holds no prompt"):
            read_prompts(path)
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(ValueError, match="is no file"):
            read_prompts(path)


@given(st.lists(st.one_of(st.text(), st.binary()), max_size=4))
def test_no_file_of_prompts_raises_anything_else(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    with pytest.raises(ValueError, match="prompts"):
        read_prompts(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
FIELDS = ("prompt", "question", "messages", "answer", "reward", "kind", "solution", "id")


@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON), max_size=3))
def test_lines_are_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        problems = read_prompts(path)
    except ValueError:
        return
    assert len(problems) <= len(rows)
    assert all(problem.answer["answer"] for problem in problems)


# ---- Two scripts and mixed lengths ---------------------------------------------------------------


def test_one_script_is_the_corpus_it_has_always_been():
    """Figures of `bench/results.md` were measured on these bytes."""
    task = make_task("permutations")
    text = "".join(itertools.islice(task.corpus(0), 1000))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7047fa18400ba61b"
    assert len(task.vocabulary) == 18


def test_two_scripts():
    """Moves of either are followed; the language is the prompt's share of the chain's letters."""
    task = make_task("permutations", scripts=2, length=2, mixing=0.5)
    assert set(task.vocabulary) > set("abcdefghijαβγδεζηθικ")
    start, moves, final = 0, ["a", "b"], int("30142"[int("04123"[0])])
    middle = int("04123"[0])
    problem = Problem("0αβ:", {"start": start, "moves": moves, "final": final, "greek": True})
    for chain, language in ((f"α{middle}β{final}", 1.0), (f"a{middle}β{final}", 0.5),
                            (f"a{middle}b{final}", 0.0), ("", 0.0)):  # fmt: skip
        found = task.inspect(problem, f"{chain}>{final}")
        assert (found["correct"], found["format_ok"]) == (True, True), chain
        assert found["language"] == language, chain
        assert found["steps_right"] == found["steps"] == len(chain) // 2
    greek = [task.prompt(0, i).answer["greek"] for i in range(40)]
    assert {True, False} == set(greek)
    chains = make_task("permutations", scripts=2, share_of_chains=1, mixing=0, noise=0)
    for i in range(20):
        prompt = chains.prompt(0, i)
        found = chains.inspect(prompt, chains.demonstrate(prompt, np.random.default_rng(i)))
        assert (found["correct"], found["language"]) == (True, 1.0)
    assert "language" not in make_task("permutations").inspect(problem, ">0")
    with pytest.raises(ValueError, match="scripts=2"):
        make_task("permutations", scripts=2, rules="mod10")


def test_problems_of_two_scripts_are_on_one_side_of_the_split():
    task = make_task("permutations", scripts=2, length=2)
    sides = {}
    for i in range(300):
        for side in ("train", "held_out"):
            sides.setdefault(task.prompt(1, i, side).key, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


def test_mixed_lengths():
    task = make_task("permutations", length=6, shortest=2)
    seen = {len(task.prompt(0, i).answer["moves"]) for i in range(200)}
    assert seen == {2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match="shortest=7"):
        make_task("permutations", length=6, shortest=7)


def test_a_sample_begins_with_a_prompt_of_the_configured_task():
    assert sample_prompt(TaskConfig(), 0) == "def "
    config = TaskConfig("permutations", ("rules=mod10", "length=3"))
    prompt = sample_prompt(config, 0)
    assert re.fullmatch(r"\d([+\-*]\d){3}:", prompt)
    assert len(character_tokenizer(configured_task(config).vocabulary).encode(prompt)) == 8
