"""Random numbers as pure functions of their key, equal on every machine and under every NumPy.

The raw words of a counter-based generator (Philox) are used directly: NumPy keeps them stable over
its versions, which it does not promise for `permutation` or `integers`, and a resumed run must draw
what the stopped one would have drawn.
"""

import numpy as np

DOCUMENT_ORDER, FIM_CHOICE, FIM_CUTS, ROW_ORDER = range(4)
"""Purposes: one independent stream each."""


def random_words(seed: int, purpose: int, epoch: int, item: int, count: int) -> np.ndarray:
    """uint64 [count], a function of the arguments alone."""
    key = np.array([seed, purpose], np.uint64)
    counter = np.array([0, epoch, item, 0], np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


def random_permutation(seed: int, purpose: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count], a permutation of 0..count-1."""
    return np.argsort(random_words(seed, purpose, epoch, 0, count), kind="stable")
