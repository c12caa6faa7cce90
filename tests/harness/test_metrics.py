"""Metrics agree with hand counts and with their defining laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.benchmarks.harness import metrics as m
from weft.benchmarks.harness import stats
from weft.benchmarks.harness.measures import measure


def test_word_errors_count_edits_over_reference_words() -> None:
    counts = m.word_errors(["three four", "one"], ["three five six", "one"])
    assert counts.tolist() == [[2, 3], [0, 1]]
    assert m.ratio(counts) == pytest.approx(0.5)


def test_vqa_accuracy_needs_three_agreeing_annotators() -> None:
    assert m.vqa_accuracy(["red"], [["red"] * 10])[0] == 1.0
    assert m.vqa_accuracy(["red"], [["red"] + ["blue"] * 9])[0] == pytest.approx(0.3)


def test_f1_and_exact_match_normalise_articles_and_case() -> None:
    assert m.exact_match(["The Cat."], ["cat"])[0] == 1
    assert m.token_f1(["red cat"], ["cat"])[0] == pytest.approx(2 / 3)


def test_identical_images_have_no_error() -> None:
    image = np.random.default_rng(0).random((11, 13))
    assert m.psnr([image], [image])[0] == 100
    assert m.ssim([image], [image])[0] == pytest.approx(1.0)
    assert m.psnr([image * 0], [image * 0 + 0.1])[0] == pytest.approx(20.0)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    a = np.random.default_rng(0).normal(size=(4000, 3))
    assert m.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert m.frechet_distance(a, a + 2.0) == pytest.approx(12.0, rel=1e-6)


def test_frechet_distance_holds_with_fewer_samples_than_features() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 30)), rng.normal(size=(6, 30)) + 1
    assert m.frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert m.frechet_distance(a, b) == pytest.approx(m.frechet_distance(b, a)) and m.frechet_distance(a, b) > 10


def test_small_slices_are_counted_not_compared() -> None:
    from weft.benchmarks.harness.aggregate import gaps
    from weft.benchmarks.harness.task import Data, Task

    task = Task("t", Data(manifest="x"), "text", ("accuracy",), slices=("who",))
    records = [
        {"key": f"{who}{i}", "answer": "a" if who != "b" or i % 2 else "x", "reference": "a", "metadata": {"who": who}}
        for who, n in (("a", 6), ("b", 8), ("c", 1))
        for i in range(n)
    ]
    found = gaps(task, records, 50)["who"]
    assert (found["best"], found["worst"], found["too_small"]) == ("a", "b", {"c": 1})
    assert found["gap"]["value"] == 0.5 and "note" in gaps(task, records[:6], 50)["who"]


def test_crps_of_a_point_forecast_is_the_absolute_error() -> None:
    assert m.crps(np.full((5, 7), 2.0), np.full(7, 3.0)) == pytest.approx(1.0)


def test_persistence_has_mase_one_on_a_ramp() -> None:
    history = np.arange(10.0)
    assert m.mase(np.array([9.0]), np.array([10.0]), history) == pytest.approx(1.0)


def test_caption_consensus_prefers_the_right_caption() -> None:
    references = [["a red cat sits on a mat"], ["two dogs run in a park"], ["one boat far at sea"]]
    right = m.caption_consensus([r[0] for r in references], references)
    wrong = m.caption_consensus([references[1][0], references[2][0], references[0][0]], references)
    assert (right > 5).all() and (wrong < 1).all()


def test_retrieval_ranks_the_relevant_item() -> None:
    out = m.retrieval(np.array([[0.1, 0.9, 0.5], [0.8, 0.1, 0.2]]), np.eye(3, dtype=bool)[[1, 2]], k=(1, 2))
    assert out["recall@1"].tolist() == [1, 0] and out["rank"].tolist() == [1, 2]


def test_calibration_error_of_an_honest_forecaster_is_small() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    assert m.calibration_error(p, rng.random(20000) < p) < 0.02
    assert m.calibration_error(np.ones(100), np.zeros(100)) == pytest.approx(1.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_interval_holds_its_value_and_repeats(scores: list[float]) -> None:
    a, b = stats.bootstrap(scores, rounds=50, seed=3), stats.bootstrap(scores, rounds=50, seed=3)
    assert a == b and min(scores) - 1e-6 <= a.low <= a.high <= max(scores) + 1e-6


def test_t_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = [(e := stats.t_interval(rng.normal(5, 2, 20))).low <= 5 <= e.high for _ in range(400)]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_slice_gap_names_best_and_worst() -> None:
    gap = stats.slice_gap("voice", ["a"] * 50 + ["b"] * 50, [1.0] * 50 + [0.0] * 25 + [1.0] * 25)
    assert (gap.best, gap.worst) == ("a", "b") and gap.gap.value == pytest.approx(0.5) and gap.gap.low > 0.3


def test_normalised_return_puts_random_at_0_and_expert_at_100() -> None:
    assert m.normalised_return([10, 500], random=10, expert=500).tolist() == [0, 100]
    with pytest.raises(ValueError, match="both 1"):
        m.normalised_return([1], 1, 1)


def test_an_interval_that_holds_too_much_is_as_wrong_as_one_that_holds_too_little() -> None:
    coverage, error = measure("coverage_90"), measure("mase")
    assert coverage.goodness(0.9) > coverage.goodness(0.95) > coverage.goodness(0.8) > coverage.goodness(1.05)
    assert error.goodness(0.5) > error.goodness(0.6) and measure("accuracy").goodness(0.6) > measure("accuracy").goodness(0.5)
