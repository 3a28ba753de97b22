"""Following a state through a chain of fixed maps: the headline task of RL without SFT.

A prompt is a start state and K moves, `3cabj..:`; the answer is `>` and the last state. Ten moves
that permute five states generate a group of order 120, so the answer cannot be read off without
following the chain (word problem of S5; for growing K beyond constant depth unless TC0 = NC1,
Li et al. 2024, "Chain of Thought Empowers Transformers to Solve Inherently Serial Problems").
The base corpus answers most prompts at once and writes some chains, `c1a4b0..>0`, with mistakes: a
model that learns to write the chain, and to write it without mistakes, answers every prompt.

With `scripts=2` a move has a Latin and a Greek letter. A prompt is in one of them, a chain of the
base corpus strays into the other with chance `mixing`, and both are right: what R1-Zero does with
languages, and what a language reward ends (R1 report, 2.3.2).

With `rules="mod10"` states are digits and a move is an operation and a digit, `+7`: 300 facts, of
which a short pre-training learns about half. RL on such a base raises length and not accuracy.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from rl.config import check_choice
from rl.problems import Problem
from rl.tasks.task import END, Inspection, Task, answer_text, check_number

_IMAGES = {
    "a": "04123", "b": "30142", "c": "42031", "d": "41032", "e": "40213",
    "f": "02341", "g": "12340", "h": "03412", "i": "23401", "j": "21403",
}  # fmt: skip
S5 = {move: tuple(map(int, images)) for move, images in _IMAGES.items()}
"""Ten permutations of five states, drawn once: the move's letter -> image of every state."""

MOD10 = {
    f"{sign}{digit}": tuple(apply(state, digit) % 10 for state in range(10))
    for sign, apply in {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}.items()
    for digit in range(10)
}
"""Adding, subtracting or multiplying by a digit, modulo ten."""

RULES = {"s5": S5, "mod10": MOD10}

GREEK = dict(zip("abcdefghij", "αβγδεζηθικ", strict=True))
"""The second script's letter of every move of S5."""


@dataclasses.dataclass(frozen=True)
class Permutations(Task):
    """Options of the chains; the defaults are those of the headline run."""

    name: ClassVar[str] = "permutations"

    length: int = 10
    """Moves in a prompt (K)."""
    share_of_chains: float = 0.3
    """Share of the demonstrations that write every state; 0: the control without chains."""
    noise: float = 0.06
    """Chance that a state in a demonstration is wrong; the chain goes on from the wrong state."""
    rules: Literal["s5", "mod10"] = "s5"
    """Permutations of five states, or sums, differences and products modulo ten."""
    shortest: int = 0
    """Fewest moves in a prompt, drawn evenly up to length; 0: all have length."""
    scripts: int = 1
    """Scripts of the moves. 1: Latin letters. 2: each move has a Greek letter too."""
    mixing: float = 0.3
    """Chance, with two scripts, that a demonstration writes a move in the other one."""

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "length", 1, 1000)
        check_number(self, "share_of_chains", 0, 1)
        check_number(self, "noise", 0, 1)
        check_choice(f"task {self.name}: rules", self.rules, RULES)
        check_number(self, "shortest", 0, self.length)
        check_number(self, "scripts", 1, 2 if self.rules == "s5" else 1)
        check_number(self, "mixing", 0, 1)

    @property
    def moves(self) -> dict[str, tuple[int, ...]]:
        """Name of a move -> the state that follows each state."""
        return RULES[self.rules]

    @property
    def _greek(self) -> dict[str, str]:
        return GREEK if self.scripts == 2 else {}

    @property
    def states(self) -> int:
        """Number of states; chance level of an answer is about 1 / states."""
        return len(next(iter(self.moves.values())))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        letters = dict.fromkeys("".join([*self.moves, *self._greek.values()]))
        digits = map(str, range(self.states))
        return tuple(dict.fromkeys([*letters, *digits, ":", ">", END]))

    def sample_prompt(self, rng: np.random.Generator) -> Problem:
        names = list(self.moves)
        start = int(rng.integers(self.states))
        count = int(rng.integers(self.shortest, self.length + 1)) if self.shortest else self.length
        moves = [names[i] for i in rng.integers(len(names), size=count)]
        state = start
        for move in moves:
            state = self.moves[move][state]
        answer = {"start": start, "moves": moves, "final": state}
        if self.scripts == 1:
            return Problem(f"{start}{''.join(moves)}:", answer, self.name)
        key = f"{start}{''.join(moves)}"
        answer["greek"] = bool(rng.integers(2))
        shown = "".join(self._greek[move] if answer["greek"] else move for move in moves)
        return Problem(f"{start}{shown}:", answer, self.name, key)

    def demonstrate(self, problem: Problem, rng: np.random.Generator) -> str:
        if rng.random() >= self.share_of_chains:
            return f">{problem.answer['final']}"
        state, written = problem.answer["start"], []
        for move in problem.answer["moves"]:
            state = self.moves[move][state]
            if rng.random() < self.noise:
                state = (state + int(rng.integers(1, self.states))) % self.states
            if self.scripts == 2 and problem.answer["greek"] != (rng.random() < self.mixing):
                move = self._greek[move]
            written.append(f"{move}{state}")
        return "".join(written) + f">{state}"

    def inspect(self, problem: Problem, text: str) -> Inspection:
        """With two scripts, adds language: share of the chain's letters in the prompt's script; 0
        for no chain, which must not be the best one."""
        latin = str.maketrans({greek: move for move, greek in self._greek.items()})
        found = self._inspect(problem, text.translate(latin))
        if self.scripts == 2:
            greek = [c in latin for c in map(ord, text) if c in latin or chr(c) in GREEK]
            same = [one == problem.answer["greek"] for one in greek]
            found["language"] = sum(same) / len(same) if same else 0.0
        return found

    def _inspect(self, problem: Problem, text: str) -> Inspection:
        body, sign, last = answer_text(text).partition(">")
        wanted = problem.answer["moves"]
        chain = self._read_chain(body)
        right, state = 0, problem.answer["start"]
        for (move, after), asked in zip(chain, wanted, strict=False):
            right += move == asked and after == self.moves[move][state]
            state = after
        whole = len(body) == sum(len(move) + 1 for move, _ in chain)
        as_asked = not body or (whole and [move for move, _ in chain] == wanted)
        ended = bool(sign) and last in map(str, range(self.states))
        return {
            "correct": bool(sign) and last == str(problem.answer["final"]),
            "format_ok": ended and as_asked,
            "steps": len(chain),
            "steps_right": right,
        }

    def _read_chain(self, body: str) -> list[tuple[str, int]]:
        """Moves and the states written after them, up to the first that is neither."""
        width, states = len(next(iter(self.moves))), [str(state) for state in range(self.states)]
        chain = []
        for at in range(0, len(body), width + 1):
            move, state = body[at : at + width], body[at + width : at + width + 1]
            if move not in self.moves or state not in states:
                break
            chain.append((move, int(state)))
        return chain
