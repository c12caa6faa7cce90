"""What every other way to decode is held to: the model's own answers, alone and from threads."""

from __future__ import annotations

import threading

import numpy as np

from tests.inference.test_generate import flat, requests
from weft.inference.generalist import Generalist


def check_equal(plain: Generalist, other: Generalist, count: int) -> None:
    """Mixed tasks give the same tokens and, to rounding, the same log-probabilities."""
    made = requests(count, 5)
    for a, b in zip(plain.generate(made), other.generate(made)):
        for one, two in zip(flat([a]), flat([b]), strict=True):
            assert np.array_equal(one.tokens, two.tokens)
            assert np.abs(one.logprobs - two.logprobs).max(initial=0) < 1e-4


def check_threads(plain: Generalist, other: Generalist, count: int) -> None:
    """As many threads as tasks on one model get what they would get alone."""
    made = requests(count, 11)
    alone = [flat(plain.generate([request])) for request in made]
    got: dict[int, list] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: flat(other.generate([made[i]]))})) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(count):
        for a, b in zip(alone[i], got[i], strict=True):
            assert np.array_equal(a.tokens, b.tokens)
