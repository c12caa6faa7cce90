"""FSQ and the codec: codes and grid points are one-to-one, a code belongs to its own token, fitting is deterministic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.codec import Codec, CodecConfig, encode_all
from weft.tokenizers.codec_fit import CodecFit, CodecReport, _batch, fit_codec, measure
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.fsq import FSQ

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=5).map(tuple)


def grids(count: int = 40, h: int = 3, w: int = 5, features: int = 7, seed: int = 0) -> list[np.ndarray]:
    """Smooth fields with three degrees of freedom."""
    random = np.random.default_rng(seed)
    y, x, f = np.mgrid[0:h, 0:w, 0:features] / 5
    return [(np.sin(a * x + b * y + c * f) / 2 + 0.5).astype(np.float32) for a, b, c in random.uniform(0, 3, (count, 3))]


@pytest.fixture(scope="module")
def fitted() -> tuple[Codec, CodecReport]:
    return fit_codec(
        grids(), CodecConfig(levels=(5, 5, 3), encoder_width=32, decoder_width=16), CodecFit(steps=120, batch_tokens=256)
    )


@settings(max_examples=100, deadline=None)
@given(LEVELS, st.integers(0, 2**31))
def test_every_code_is_the_code_of_its_own_grid_point(levels: tuple[int, ...], seed: int) -> None:
    """codes(z) = c where values(c) is what round(z) returns: numpy and torch agree, and every z has a code inside the span."""
    fsq = FSQ(levels)
    z = np.random.default_rng(seed).normal(0, 2, (50, len(levels)))
    codes = fsq.codes(z)
    assert codes.min() >= 0 and codes.max() < fsq.size == np.prod(levels)
    assert np.allclose(fsq.values(codes), fsq.round(torch.from_numpy(z)).numpy(), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(LEVELS)
def test_all_codes_can_be_reached(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    axes = [np.linspace(-4, 4, 201)] * len(levels)
    for i, axis in enumerate(axes):
        z = np.zeros((len(axis), len(levels)))
        z[:, i] = axis
        assert len(np.unique(fsq.codes(z))) == levels[i]
    assert len(np.unique(fsq.values(np.arange(min(fsq.size, 5000))), axis=0)) == min(fsq.size, 5000)


def test_infinite_latents_stay_in_the_span() -> None:
    fsq = FSQ((8, 5))
    assert fsq.codes(np.array([[np.inf, np.inf], [-np.inf, -np.inf]])).tolist() == [39, 0]


def test_gradients_pass_through_rounding() -> None:
    z = torch.zeros(3, 2, requires_grad=True)
    FSQ((5, 4)).round(z).sum().backward()
    assert z.grad is not None and (z.grad > 0).all()


@pytest.mark.parametrize("levels", [(), (1,), (2, 0), (5000,), (4096, 4096, 2), (2.5,)])
def test_bad_levels_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(TokenizerError, match="FSQ levels"):
        FSQ(levels)


def test_fitting_learns_the_data(fitted: tuple[Codec, CodecReport]) -> None:
    codec, report = fitted
    variance = np.concatenate([g.ravel() for g in grids()]).var()
    assert report.mse < 0.3 * variance
    assert 1 < report.perplexity <= report.codes_used <= report.codes == codec.size == 75
    assert report.tokens == 40 * 15 and report.steps == 120
    assert measure(codec, grids(seed=1)).mse < 0.4 * variance


def test_a_code_depends_on_its_own_token_only(fitted: tuple[Codec, CodecReport]) -> None:
    codec, _ = fitted
    x = grids()[0].reshape(15, 7)
    y = x.copy()
    y[4] = 1 - y[4]
    assert np.flatnonzero(codec.encode(x) != codec.encode(y)).tolist() == [4]


def test_codes_do_not_depend_on_what_is_encoded_beside_them(fitted: tuple[Codec, CodecReport]) -> None:
    codec, _ = fitted
    parts = [g.reshape(15, 7) for g in grids(200, seed=2)]
    together = encode_all(codec, parts)
    assert all(np.array_equal(codec.encode(p), t) for p, t in zip(parts, together))
    assert encode_all(codec, []) == [] and len(codec.encode(np.zeros((0, 7), np.float32))) == 0
    assert encode_all(None, parts)[0].tolist() == [-1] * 15


def test_the_same_seed_gives_the_same_codec_and_leaves_the_global_state_alone() -> None:
    config, plan = CodecConfig(levels=(4, 3), encoder_width=8, decoder_width=8), CodecFit(steps=5, batch_tokens=64, seed=3)
    before = torch.random.get_rng_state()
    one, two = (fit_codec(grids(9), config, plan)[0].arrays() for _ in range(2))
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert torch.equal(before, torch.random.get_rng_state())
    other = fit_codec(grids(9), config, CodecFit(steps=5, batch_tokens=64, seed=4))[0].arrays()
    assert any(not np.array_equal(one[k], other[k]) for k in one)


def test_grids_of_different_sizes_fit_together_and_progress_is_told() -> None:
    told: list[tuple[int, int, float]] = []
    mixed = [g[: 1 + i % 3, : 1 + i % 5] for i, g in enumerate(grids(20))]
    codec, report = fit_codec(mixed, CodecConfig(levels=(3, 3)), CodecFit(steps=4), lambda *a: told.append(a))
    assert [t[:2] for t in told] == [(i, 4) for i in range(1, 5)]
    assert report.tokens == sum(g.shape[0] * g.shape[1] for g in mixed)
    assert not codec.flat


def test_a_step_does_not_repeat_the_few_crops_that_there_are() -> None:
    random, plan = np.random.default_rng(0), CodecFit(batch_tokens=1024, crop=3)
    for count, most in ((1, 1), (4, 24), (400, 1024 // 9)):  # a grid of 3 x 5 has three crops of 3 x 3
        some = [g[:, :3] for g in grids(1)] if count == 1 else grids(count)
        assert len(_batch(some, np.array([g.shape[:2] for g in some]), plan, random)) == most


def test_constant_data_fits_without_nan() -> None:
    codec, report = fit_codec([np.ones((2, 3, 5), np.float32)] * 3, CodecConfig(levels=(3,)), CodecFit(steps=5))
    assert np.isfinite(report.mse) and np.isfinite(codec.decode(np.zeros(6, np.int64), (2, 3))).all()


def test_arrays_that_do_not_fit_the_config_are_refused(fitted: tuple[Codec, CodecReport]) -> None:
    codec, _ = fitted
    again = Codec.from_arrays(codec.config, codec.arrays(), 7, flat=False)
    x = grids()[3].reshape(15, 7)
    assert np.array_equal(again.encode(x), codec.encode(x))
    assert np.array_equal(again.decode(again.encode(x), (3, 5)), codec.decode(codec.encode(x), (3, 5)))
    with pytest.raises(TokenizerError, match="do not fit its config"):
        Codec.from_arrays(CodecConfig(levels=(5, 5)), codec.arrays(), 7, flat=False)
    with pytest.raises(TokenizerError, match="no codec"):
        Codec.from_arrays(codec.config, {}, 7, flat=False)


def test_nothing_to_fit_and_the_wrong_width_are_errors(fitted: tuple[Codec, CodecReport]) -> None:
    with pytest.raises(TokenizerError, match="at least one"):
        fit_codec([], CodecConfig(), CodecFit())
    with pytest.raises(TokenizerError, match="fitted on 7 features per token, got 5"):
        fitted[0].encode(np.zeros((2, 5), np.float32))
