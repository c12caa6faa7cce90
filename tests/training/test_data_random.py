"""Draws are pure functions of their purpose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.training.random import generator, integer, key, permutation, torch_seed, uniform, uniforms

PART = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=8))


@given(st.lists(PART, max_size=4), st.lists(PART, max_size=4))
def test_only_equal_purposes_share_a_key(left: list, right: list) -> None:
    typed = [[(type(part), part) for part in side] for side in (left, right)]
    assert (key(3, *left) == key(3, *right)) == (typed[0] == typed[1])


def test_known_values_never_change() -> None:
    """These guard the order of every run that was ever started; a change here is a new data format."""
    assert key(7, "order", 3) == 93543739044667595394685444380913064341
    assert permutation(7, 5, "x").tolist() == [0, 4, 2, 1, 3, 6, 5]
    assert generator(1, "a").integers(0, 100, 3).tolist() == generator(1, "a").integers(0, 100, 3).tolist()


@given(st.integers(0, 500), st.integers(0, 10**9))
def test_permutation_holds_every_number_once(count: int, seed: int) -> None:
    assert np.array_equal(np.sort(permutation(count, seed, "p")), np.arange(count))


def test_draws_are_uniform() -> None:
    values = uniforms(20_000, 0, "u")
    singles = np.array([uniform(0, "v", i) for i in range(5_000)])
    for draws in (values, singles):
        assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.02 and abs(draws.var() - 1 / 12) < 0.005
    counts = np.bincount([integer(7, 0, i) for i in range(7_000)], minlength=7)
    assert counts.min() > 850 and counts.max() < 1150
    assert 0 <= torch_seed(1, "t") < 2**63
    with pytest.raises(ValueError, match="at least one choice"):
        integer(0, 1)
