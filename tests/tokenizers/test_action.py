"""Action tokenizer: every decoded action is legal; bins err by half a bin, chunks by their quantisation step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.base import Tokenizer
from weft.tokenizers.chunks import ChunkCodec, fit_chunks
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.segment import Action, ActionSpace, Text

BOX = ActionSpace(low=(-1.0, 0.0, -100.0), high=(1.0, 5.0, 300.0))


def trajectories(count: int = 60, steps: int = 50, seed: int = 0) -> list[Action]:
    """Smooth motions inside BOX."""
    random = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)[:, None]
    low, high = np.array(BOX.low), np.array(BOX.high)
    out = []
    for _ in range(count):
        wave = np.sin(2 * np.pi * random.uniform(0.2, 2, 3) * t + random.uniform(0, 6, 3)) * random.uniform(0.2, 1, 3)
        out.append(Action((wave + 1) / 2 * (high - low) + low, BOX, rate_hz=50))
    return out


@pytest.fixture(scope="module")
def chunked() -> ActionTokenizer:
    return ActionTokenizer.fit(trajectories(), ActionConfig(discrete=7, bins=11), steps=16, size=512)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 2000), st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 5), st.floats(-100, 300)), min_size=1, max_size=9)
)
def test_the_round_trip_error_is_at_most_half_a_bin(bins: int, values: list[tuple[float, float, float]]) -> None:
    tokenizer = ActionTokenizer(ActionConfig(discrete=5, bins=bins))
    tokens = tokenizer.encode(Action(values, BOX, rate_hz=10))
    assert tokens.codes.min() >= 5 and tokens.codes.max() < 5 + bins == tokenizer.size
    decoded = tokenizer.decode(tokens.codes, tokens.grid, space=BOX).values
    assert (np.abs(decoded - values) <= np.array([2, 5, 400]) / bins / 2 * (1 + 1e-9)).all()
    assert (decoded >= BOX.low).all() and (decoded <= BOX.high).all()


def test_the_bounds_are_the_outer_bins_and_values_beyond_saturate() -> None:
    tokenizer = ActionTokenizer(ActionConfig(discrete=5, bins=256))
    tokens = tokenizer.encode(Action([[1, 5, 300], [-1, 0, -100], [99, 99, 999]], BOX, rate_hz=1))
    assert tokens.codes.tolist() == [260] * 3 + [5] * 3 + [260] * 3
    assert tokens.features is not None and tokens.features[:6, 0].tolist() == [1] * 3 + [-1] * 3
    assert tokens.grid == (3, 3) and tokens.group == 3
    assert tokens.place is not None and tokens.place[:, 0].tolist() == [0, 1, 2] * 3
    assert tokens.time.tolist() == [s * 10**9 for s in range(3) for _ in range(3)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=9))))
def test_discrete_actions_come_back_exactly(case: tuple[int, list[int]]) -> None:
    n, values = case
    tokenizer = ActionTokenizer(ActionConfig(discrete=30))
    tokens = tokenizer.encode(Action(np.array(values, np.int64), ActionSpace(n=n), rate_hz=2))
    assert tokens.codes.tolist() == values and tokens.grid == (len(values), 1) and tokens.group == 1
    decoded = tokenizer.decode(tokens.codes, tokens.grid, space=ActionSpace(n=n))
    assert decoded.values.tolist() == values and decoded.space.n == n


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 511), max_size=30), st.integers(1, 5))
def test_any_chunk_pieces_decode_to_finite_actions_in_bounds(codes: list[int], dims: int) -> None:
    tokenizer = _chunked()
    space = ActionSpace(low=(-2.0,) * dims, high=(3.0,) * dims)
    local = np.array(codes, np.int64) % tokenizer.size_chunks + tokenizer.size_discrete + tokenizer.size_bins
    values = tokenizer.decode(local, (0, dims), space=space).values
    assert values.shape[1] == dims and len(values) % 16 == 0 and bool(len(values)) == bool(codes)
    assert np.isfinite(values).all() and ((values >= -2) & (values <= 3)).all()


_made: list[ActionTokenizer] = []


def _chunked() -> ActionTokenizer:
    if not _made:
        _made.append(ActionTokenizer.fit(trajectories(9), ActionConfig(discrete=7, bins=11), size=400))
    return _made[0]


def test_chunks_keep_the_motion_in_far_fewer_tokens(chunked: ActionTokenizer) -> None:
    for segment in trajectories(5, seed=1):
        tokens = chunked.encode(segment)
        assert len(tokens) < 50 * 3 / 2, "half of one token per number"
        assert tokens.codes.min() >= 18 and tokens.codes.max() < chunked.size
        decoded = chunked.decode(tokens.codes, tokens.grid, space=BOX, steps=50).values
        error = np.abs(decoded - segment.values) / (np.array(BOX.high) - BOX.low) * 2
        assert decoded.shape == (50, 3) and error.max() < 0.25 and error.mean() < 0.05
        assert tokens.group == len(tokens) and np.unique(tokens.time).tolist() == [i * 320_000_000 for i in range(4)]


def test_a_finer_scale_makes_chunks_more_exact() -> None:
    error = []
    for scale in (3.0, 30.0):
        tokenizer = ActionTokenizer.fit(trajectories(20), steps=16, scale=scale, size=800)
        tokens = tokenizer.encode(trajectories(1)[0])
        error.append(
            np.abs(tokenizer.decode(tokens.codes, tokens.grid, space=BOX, steps=50).values - trajectories(1)[0].values).max()
        )
    assert error[1] < error[0] / 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=2), min_size=1, max_size=40), st.integers(2, 9))
def test_merging_loses_nothing(values: list[list[float]], steps: int) -> None:
    """Pieces expand to exactly the integers that they were merged from, whatever was learnt."""
    table = np.array(values)
    codec = fit_chunks([table, table[::-1]], steps, 5.0, 90)
    for symbols, pieces in zip(codec.symbols(table), codec.encode(table), strict=True):
        assert [s for p in pieces for s in codec._expand[p]] == symbols.tolist()
        assert all(0 <= p < codec.size for p in pieces)


def test_learning_merges_and_applying_them_agree() -> None:
    """What training made of its own text is what encoding makes of it."""
    table = np.tile([[0.5], [0.5], [-0.5], [0.25]], (20, 1))
    codec = fit_chunks([table], 4, 10.0, 60)
    assert len(codec.merges) == 3 and all(len(c) == 1 for c in codec.encode(table))


def test_a_cut_off_chunk_decodes_with_its_high_frequencies_missing() -> None:
    codec = ChunkCodec(steps=4, scale=10)
    assert np.allclose(codec.decode([codec.limit + 20], 1), 1.0), "only the mean, 20 / 10 / sqrt(4)"
    assert codec.decode([], 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("action", "needle"),
    [
        (Action([0], ActionSpace(n=99), rate_hz=1), "99 choices, the tokenizer 5"),
        (Action([3], ActionSpace(n=3), rate_hz=1), r"its space allows 0\.\.2"),
        (Action([0.5], ActionSpace(n=3), rate_hz=1), "needs integers"),
        (Action([-1], ActionSpace(n=3), rate_hz=1), r"-1\.\."),
        (Action([[0.0, 0.0]], BOX, rate_hz=1), "has 2 numbers per action, its space has 3"),
        (Action([[0.0, 0.0, np.nan]], BOX, rate_hz=1), "NaN or infinite"),
        (Action([[0.0, np.inf, 0.0]], BOX, rate_hz=1), "NaN or infinite"),
        (Action([[0.0]], ActionSpace(low=(-np.inf,), high=(1.0,)), rate_hz=1), "must be finite"),
    ],
)
def test_bad_actions_are_told_what_to_do(action: Action, needle: str) -> None:
    with pytest.raises(TokenizerError, match=needle):
        ActionTokenizer(ActionConfig(discrete=5)).encode(action)


@pytest.mark.parametrize(
    ("codes", "grid", "space"),
    [
        ([4], (1, 1), ActionSpace(n=4)),  # beyond the space
        ([4, 5], (2, 1), None),  # discrete and bin mixed
        ([5, 5], (1, 2), BOX),  # other dimensions
        ([5], (1, 1), ActionSpace(n=4)),  # a bin for a discrete space
        ([1], (1, 1), ActionSpace(low=(0.0,), high=(1.0,))),  # the other way round
        ([261], (1, 1), None),
        ([-1], (1, 1), None),
        ([5, 5], (1, 1), None),
        ([5], (1,), None),
    ],
)
def test_codes_that_are_no_legal_action_raise(codes: list[int], grid: tuple[int, ...], space: ActionSpace | None) -> None:
    with pytest.raises(TokenizerError):
        ActionTokenizer(ActionConfig(discrete=5, bins=256)).decode(np.array(codes), grid, space=space)


def test_no_steps_at_all_round_trip(chunked: ActionTokenizer) -> None:
    for tokenizer in (chunked, ActionTokenizer(ActionConfig(discrete=5))):
        for segment in (Action(np.zeros((0, 3)), BOX, rate_hz=1), Action(np.zeros(0, np.int64), ActionSpace(n=5), rate_hz=1)):
            tokens = tokenizer.encode(segment)
            assert len(tokens) == 0
            assert len(tokenizer.decode(tokens.codes, tokens.grid, space=segment.space).values) == 0


def test_save_and_load(chunked: ActionTokenizer, tmp_path: Path) -> None:
    for i, tokenizer in enumerate((chunked, ActionTokenizer(ActionConfig(discrete=3)))):
        tokenizer.save(tmp_path / str(i))
        loaded = ActionTokenizer.load(tmp_path / str(i))
        assert isinstance(loaded, Tokenizer) and loaded.digest() == tokenizer.digest() and loaded.size == tokenizer.size
        assert np.array_equal(loaded.encode(trajectories(1)[0]).codes, tokenizer.encode(trajectories(1)[0]).codes)
    assert [p.name for p in (tmp_path / "0").iterdir()] == ["tokenizer.json"]


def test_bad_configs_and_files_are_refused(tmp_path: Path) -> None:
    for name, value in (("bins", 1), ("bins", -1), ("discrete", -1), ("continuous", "words")):
        with pytest.raises(TokenizerError, match=str(name)):
            ActionConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"ActionTokenizer\.fit"):
        ActionTokenizer(ActionConfig(continuous="chunks"))
    with pytest.raises(TokenizerError, match="does not exist yet"):
        ChunkCodec(4, 10.0, ((9999, 0),))
    with pytest.raises(TokenizerError, match="below the alphabet"):
        fit_chunks([np.zeros((4, 1))], 16, 100.0, 100)
    with pytest.raises(TokenizerError, match="no continuous Action"):
        ActionTokenizer.fit([Action([0], ActionSpace(n=2), rate_hz=1)])
    with pytest.raises(TokenizerError, match="got Text"):
        ActionTokenizer().encode(Text("x"))
    with pytest.raises(TokenizerError, match="has no bins"):
        ActionTokenizer(ActionConfig(bins=0)).encode(trajectories(1)[0])


def test_a_space_takes_an_environments_numbers_and_holds_plain_ones() -> None:
    box = ActionSpace(low=np.array([-2, 0], np.float32), high=[2.0, 1])  # type: ignore[arg-type]
    plain = ActionSpace(low=(-2.0, 0.0), high=(2.0, 1.0))
    assert box == plain and hash(box) == hash(plain)
    assert type(ActionSpace(n=np.int64(3)).n) is int  # type: ignore[arg-type]
    for wrong in (4.5, True, "4", 0):
        with pytest.raises(ValueError, match="integer n >= 1"):
            ActionSpace(n=wrong)  # type: ignore[arg-type]
