"""The order of the data is a pure function of (seed, step); mixtures keep their weights, caps and ends."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.training.data.mixture import PERIOD, DataExhausted, Mixture, Share, shares, slots
from weft.training.data.sampling import assign, choose_pair, dropped, prompt_draw, replacement, step_draws


def test_weights_are_exact_over_a_period_and_close_within_a_step() -> None:
    mixture = Mixture([Share("a", 101, weight=0.7), Share("b", 37, weight=0.2), Share("c", 1009, weight=0.1)], seed=3)
    who = [mixture.at(g)[0] for g in range(PERIOD)]
    assert [who.count(k) for k in range(3)] == slots(mixture.shares).tolist() == [2867, 819, 410]
    for start in range(0, PERIOD - 50, 50):
        assert abs(who[start : start + 50].count(0) - 35) <= 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 5)), min_size=1, max_size=4), st.integers(0, 99))
def test_no_unit_is_lost_or_repeated_within_a_pass(sources: list[tuple[int, float]], seed: int) -> None:
    mixture = Mixture([Share(f"s{i}", n, weight=w) for i, (n, w) in enumerate(sources)], seed=seed)
    seen: dict[int, list[int]] = {}
    for g in range(600):
        source, position = mixture.at(g)
        assert position == len(seen.setdefault(source, []))
        seen[source].append(mixture.unit(source, position))
    for source, units in seen.items():
        n = sources[source][0]
        for start in range(0, len(units) - n + 1, n):
            assert sorted(units[start : start + n]) == list(range(n))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 900), st.floats(0.05, 5), st.one_of(st.none(), st.floats(0.1, 9))), min_size=1, max_size=4
    )
)
def test_a_source_ends_exactly_at_its_repeats(sources: list[tuple[int, float, float | None]]) -> None:
    made = [Share(f"s{i}", n, weight=w, repeats=r) for i, (n, w, r) in enumerate(sources)]
    mixture = Mixture(made, seed=1)
    draws = 3 * PERIOD if mixture.draws is None else min(mixture.draws, 3 * PERIOD)
    seen = Counter(mixture.at(g) for g in range(draws))
    assert set(seen.values()) == {1}
    count = Counter(source for source, _ in seen)
    for k, share in enumerate(made):
        assert {p for source, p in seen if source == k} == set(range(count[k]))
        if share.limit is not None:
            assert count[k] <= share.limit and (draws != mixture.draws or count[k] == share.limit)
    if mixture.draws is not None:
        assert mixture.draws == sum(s.limit or 0 for s in made)
        with pytest.raises(DataExhausted, match="raise repeats"):
            mixture.at(mixture.draws)


def test_shares_follow_size_cap_and_temperature() -> None:
    sizes = [Share("a", 100), Share("b", 10_000, cap=900)]
    assert shares(sizes).tolist() == [0.1, 0.9]
    assert np.allclose(shares(sizes, temperature=2.0), [0.25, 0.75])
    with pytest.raises(ValueError, match="'b' has no weight"):
        shares([Share("a", 1, weight=1.0), Share("b", 1)])


def test_order_differs_by_seed_pass_and_source() -> None:
    orders = {
        tuple(Mixture([Share(name, 31)], seed=seed).unit(0, p) for p in range(run * 31, run * 31 + 31))
        for seed in (0, 1)
        for name in "ab"
        for run in (0, 1)
    }
    assert len(orders) == 8


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_assignment_is_a_partition_and_balanced(costs: list[int], bins: int) -> None:
    held = assign(costs, bins)
    assert sorted(i for items in held for i in items) == list(range(len(costs)))
    if len(costs) >= bins:
        assert all(held)
    loads = [sum(max(costs[i], 1) for i in items) for items in held]
    assert max(loads) - min(loads) <= max([max(c, 1) for c in costs], default=0)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 5))
def test_the_global_batch_does_not_depend_on_the_world(step: int, world: int, accumulate: int) -> None:
    draws = step_draws(step, 35)
    costs = [(g * 7919) % 501 for g in draws]
    split = [draws[i] for items in assign(costs, world * accumulate) for i in items]
    assert sorted(split) == list(range(step * 35, step * 35 + 35))


@given(st.lists(st.tuples(st.sampled_from(["text", "image", "audio"]), st.booleans()), max_size=7), st.integers(0, 10**6))
def test_dropout_spares_targets_and_one_observed_segment(segments: list[tuple[str, bool]], draw: int) -> None:
    modalities, observed = [m for m, _ in segments], [o for _, o in segments]
    gone = dropped(modalities, observed, {"text": 0.9, "image": 0.9, "audio": 1.0}, 5, draw)
    assert all(observed[i] for i in gone)
    assert not any(observed) or len(gone) < sum(observed)
    assert dropped(modalities, observed, {}, 5, draw) == []


def test_dropout_prompts_pairs_and_replacements_have_their_rates() -> None:
    n = 4000
    gone = sum(dropped(["text", "image"], [True, True], {"image": 0.3}, 0, g) == [1] for g in range(n)) / n
    prompts = Counter(prompt_draw(0, g, 0.25) for g in range(n))
    assert abs(gone - 0.3) < 0.03 and abs(prompts["end"] / n - 0.125) < 0.02 and abs(prompts["any"] / n - 0.125) < 0.02
    pairs = Counter(tuple(choose_pair(0, g, [3, 5, 7])) for g in range(n))
    assert len(pairs) == 6 and all(abs(v / n - 1 / 6) < 0.03 for v in pairs.values())
    assert len({replacement(0, 1, attempt, 1000) for attempt in range(20)}) > 15


SCRIPT = """
from weft.training.data.mixture import Mixture, Share
import hashlib
m = Mixture([Share("a", 101, weight=.7), Share("b", 37, weight=.3, repeats=2.5)], seed=7)
print(hashlib.sha256(repr([(m.at(g), m.unit(*m.at(g))) for g in range(500)]).encode()).hexdigest())
"""


def test_hash_seed_folder_and_zone_change_nothing(tmp_path: os.PathLike) -> None:
    found = set()
    for seed, zone, folder in (("0", "UTC", "."), ("77", "Asia/Kathmandu", tmp_path)):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=folder, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1
