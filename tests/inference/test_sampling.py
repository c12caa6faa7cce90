"""Sampling draws from the distribution it says, from noise that depends on nothing else."""

import subprocess
import sys

import numpy as np
import pytest

from weft.inference.errors import SamplingError
from weft.inference.sampling import Sampling, draw, uniform

LOGPROB = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))
ALL = np.arange(5)


def shares(sampling: Sampling, legal: np.ndarray = ALL, n: int = 4000) -> np.ndarray:
    drawn = [draw(LOGPROB, legal, sampling, "image", uniform(3, 0, i)) for i in range(n)]
    return np.bincount(drawn, minlength=5) / n


def test_draws_follow_the_distribution() -> None:
    assert np.abs(shares(Sampling()) - np.exp(LOGPROB)).max() < 0.03


def test_the_smallest_temperature_is_greedy() -> None:
    assert draw(LOGPROB, ALL, Sampling(temperature=5e-324), "text", 0.99) == 1


def test_temperature_sharpens_by_its_power() -> None:
    expected = np.exp(LOGPROB * 2) / np.exp(LOGPROB * 2).sum()
    assert np.abs(shares(Sampling(temperature=0.5)) - expected).max() < 0.03


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_p=0.7), {1, 3}),
        (Sampling(top_p=0.71), {1, 3, 4}),
        (Sampling(min_p=0.3), {1, 3, 4}),
        (Sampling(temperature=0), {1}),
        (Sampling(top_k=1), {1}),
        (Sampling(), {0, 1, 2, 3, 4}),
    ],
)
def test_restrictions_keep_exactly_these(sampling: Sampling, kept: set[int]) -> None:
    assert set(np.flatnonzero(shares(sampling))) == kept


def test_only_legal_tokens_are_drawn_and_share_what_remains() -> None:
    found = shares(Sampling(), np.array([0, 2, 4]))
    assert np.abs(found - np.array([0.05, 0, 0.1, 0, 0.15]) / 0.3).max() < 0.03


def test_repetition_penalty_weakens_only_what_was_seen() -> None:
    assert draw(LOGPROB, ALL, Sampling(temperature=0, repetition_penalty=2.0), "text", 0.5, {1}) == 3


def test_default_temperature_is_greedy_for_text_and_not_for_media() -> None:
    assert (Sampling().temperature_of("text"), Sampling().temperature_of("action")) == (0.0, 0.0)
    assert Sampling().temperature_of("image") == 1.0


def test_noise_is_the_same_in_another_process() -> None:
    code = "from weft.inference.sampling import uniform; print([uniform(7, 2, i) for i in range(5)])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([uniform(7, 2, i) for i in range(5)])
    assert len({uniform(s, n, i) for s in range(3) for n in range(3) for i in range(3)}) == 27


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0},
        {"guidance": -1},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(SamplingError, match=next(iter(wrong))):
        Sampling(**wrong)
