"""Whether an answer in mathematics is the expected one. Enter by `equivalence.py`.

    equivalence.py  the verdict: `same_number`, `same_maths`
    quantities.py   the number within an answer: units, words around it, percent, mixed numbers
    notation.py     what stands around expressions: tuples, sets, intervals, matrices, inequalities
    expressions.py  text to trees, and their exact or approximate values
    symbolic.py     whether two trees are equal, by sympy in a process of its own

What words mean, in any language, is in the table `rl/verdict/words.toml`. The verdict is this
project's own because a false "right" is what a policy learns to exploit.
Measured by the tables of `tests/test_rl_equivalence.py`, math-verify 0.9 accepts 57 of 731 wrong
answers, such as "5 million" and "3 + 2" for 5.
"""
