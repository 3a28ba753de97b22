"""Dynamic sampling: groups with nothing to compare are replaced by groups of further prompts."""

import dataclasses

import numpy as np
import pytest

from rl.config import GRPOConfig, RLConfig
from rl.problems import Problem
from rl.prompts import Questions
from rl.resample import Asked, choose, differing
from rl.rollout import Rollout
from rl.verdict.scoring import Scores

CONFIG = GRPOConfig(group_size=2, dynamic_sampling=True)


def asked(number: int, rewards: list[float]) -> Asked:
    """Two answers to each of two prompts; answer a of round n has a + 1 tokens, all 10 n + a."""
    names = [10 * number + a for a in range(4)]
    tokens = [np.full(a + 1, name, np.int32) for a, name in enumerate(names)]
    problems = [Problem(f"prompt {number}.{p}", p, "test") for p in range(2)]
    return Asked(
        Questions(problems, [np.array([number, p], np.int32) for p in range(2)]),
        Rollout(
            tokens=tokens,
            logps=[-ids.astype(np.float32) for ids in tokens],
            truncated=np.array([False, True, False, number == 1]),
            routes=[ids[:, None].astype(np.int16) for ids in tokens],
            seconds=1.5, passes=7,
        ),
        [str(name) for name in names],
        Scores({"accuracy": np.array(rewards)}, {"accuracy": 1.0}, np.array(rewards) > 0.5, {}),
    )  # fmt: skip


def test_groups_that_differ_come_first():
    rounds = [asked(0, [1, 1, 0, 1]), asked(1, [0, 0, 0, 0]), asked(2, [0, 1, 1, 0])]
    assert [differing(one, CONFIG).tolist() for one in rounds] == [
        [False, True], [False, False], [True, True],
    ]  # fmt: skip
    chosen = choose(rounds, CONFIG, 2)
    assert chosen.texts == ["2", "3", "20", "21"]
    assert [r.prompt for r in chosen.questions.problems] == ["prompt 0.1", "prompt 2.0"]
    assert [ids.tolist() for ids in chosen.questions.ids] == [[0, 1], [2, 0]]
    assert [ids[0] for ids in chosen.rollout.tokens] == [2, 3, 20, 21]
    assert [len(ids) for ids in chosen.rollout.logps] == [3, 4, 1, 2]
    assert chosen.rollout.routes is not None
    assert [x[0, 0] for x in chosen.rollout.routes] == [2, 3, 20, 21]
    assert chosen.rollout.kept is None
    assert chosen.rollout.truncated.tolist() == [False, False, False, True]
    assert chosen.scores.parts["accuracy"].tolist() == [0, 1, 0, 1]
    assert chosen.scores.correct.tolist() == [False, True, False, True]
    assert (chosen.rollout.seconds, chosen.rollout.passes) == (4.5, 21)


def test_groups_that_do_not_differ_fill_what_is_left():
    rounds = [asked(0, [1, 1, 0, 0]), asked(1, [0, 0, 1, 0])]
    assert choose(rounds, CONFIG, 2).texts == ["12", "13", "0", "1"]
    assert choose(rounds[:1], CONFIG, 2).texts == ["0", "1", "2", "3"]


def test_kept_tokens_follow_their_answers():
    rounds = [asked(0, [1, 1, 1, 1]), asked(1, [0, 1, 1, 0])]
    rounds = [
        dataclasses.replace(one, rollout=dataclasses.replace(one.rollout, kept=one.rollout.tokens))
        for one in rounds
    ]
    kept = choose(rounds, CONFIG, 2).rollout.kept
    assert kept is not None
    assert [ids[0] for ids in kept] == [10, 11, 12, 13]


def test_resampling_needs_the_filter():
    with pytest.raises(ValueError, match=r"rl\.resample is 2, but groups without any difference"):
        RLConfig(resample=2)
    assert RLConfig(resample=2, objective=CONFIG).resample == 2
