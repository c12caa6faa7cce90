"""Specialists beat chance on a tiny world and obey their own laws."""

from pathlib import Path

import numpy as np
import pytest

from weft.benchmarks.world import material
from weft.benchmarks.world.hmm import edits, word_error_rate
from weft.benchmarks.world.ngram import NgramText
from weft.benchmarks.world.specialists import Judges, picture_features, score_specialists


def test_judges_read_and_hear_what_they_never_met(world: Path) -> None:
    judges = Judges(world)
    rows = material.lines(world, "digit_image", "test")
    right = [judges.judge_digit(material.pixels(world, material.segment(r, "image"))) == material.label(r) for r in rows]
    assert np.mean(right) >= 0.6
    rows = material.lines(world, "digit_speech", "test")
    right = [judges.judge_speech(*material.wave(world, material.segment(r, "audio"))) == material.label(r) for r in rows]
    assert np.mean(right) >= 0.5


def test_pictures_of_any_layout_give_the_same_features() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2)
    expected = picture_features(grey)
    np.testing.assert_allclose(picture_features(colour), expected)
    np.testing.assert_allclose(picture_features(np.moveaxis(colour, 2, 0) / 255), expected)
    with pytest.raises(ValueError, match="8 x 8"):
        picture_features(np.zeros((7, 8)))


def test_small_specialists_beat_chance(world: Path) -> None:
    names = ["motor: forecast", "motor: fault", "half image -> rest", "speech -> words", "video -> digit and direction"]
    found = score_specialists(world, [*names, "prose", "prose, unigram"])
    assert found["motor: forecast"].value < 0.6
    assert found["motor: fault"].value >= 0.6
    assert found["half image -> rest"].value < 0.3
    assert found["speech -> words"].value < 0.7
    assert found["video -> digit and direction"].value > 2 / 80
    assert found["prose"].value < found["prose, unigram"].value < 8
    with pytest.raises(ValueError, match="no specialist"):
        score_specialists(world, ["smell"])


@pytest.mark.parametrize("order", [1, 3])
def test_ngram_probabilities_sum_to_one_after_any_context(order: int) -> None:
    model = NgramText(order).fit(["a stream in time order", "a stray tree"])
    for context in (b"", b"a", b" st", b"zq"):
        assert sum(model.probability(context, byte) for byte in range(256)) == pytest.approx(1)


def test_edit_distance_counts_insertions_deletions_and_substitutions() -> None:
    assert edits((1, 2, 3), (1, 2, 3)) == 0
    assert edits((1, 2), (1, 2, 3)) == edits((1, 2, 3), (1, 3)) == edits((1, 4, 3), (1, 2, 3)) == 1
    assert edits((), (5, 6)) == 2
    assert word_error_rate([(1, 2), (3,)], [(1, 2), (4,)]) == pytest.approx(1 / 3)
