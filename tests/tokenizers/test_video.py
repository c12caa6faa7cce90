"""Video tokenizer: frames keep their times, patches their places; codes are the image tokenizer's."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from weft.tokenizers.base import Tokenizer
from weft.tokenizers.codec import CodecConfig
from weft.tokenizers.codec_fit import CodecFit
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.image import ImageConfig, ImageTokenizer, standardise
from weft.tokenizers.segment import Image, Video
from weft.tokenizers.video import VideoConfig, VideoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import media_samples as samples

FRAMES = np.random.default_rng(0).random((5, 6, 10, 3), np.float32)
MS = 1_000_000


@pytest.fixture(scope="module")
def image() -> ImageTokenizer:
    return ImageTokenizer.fit(list(FRAMES), ImageConfig(patch=2), CodecConfig(levels=(5, 3, 3)), CodecFit(steps=5))[0]


@pytest.mark.parametrize("temporal", [1, 2, 3, 5, 7])
def test_a_token_holds_its_frames_and_the_time_of_the_first(temporal: int) -> None:
    tokens = VideoTokenizer(VideoConfig(patch=2, temporal=temporal)).encode(Video(FRAMES, rate_hz=10))
    steps = -(-5 // temporal)
    assert tokens.grid == (steps, 3, 5) and tokens.group == 15
    assert tokens.features is not None and tokens.features.shape == (steps * 15, temporal * 12)
    assert tokens.time.tolist() == [s * temporal * 100 * MS for s in range(steps) for _ in range(15)]
    for s in range(steps):
        for t in range(temporal):
            frame = FRAMES[min(s * temporal + t, 4)]  # the last frame is repeated
            token = tokens.features[s * 15 + 1 * 5 + 2].reshape(temporal, 2, 2, 3)
            assert np.array_equal(token[t], standardise(frame[2:4, 4:6]))
    assert tokens.place is not None
    assert tokens.place[:15].tolist() == tokens.place[-15:].tolist() == [[i, j] for i in range(3) for j in range(5)]


def test_frames_are_coded_as_images_are(image: ImageTokenizer) -> None:
    video = VideoTokenizer(VideoConfig(patch=2), image)
    assert video.size == image.size == 45
    tokens = video.encode(Video(FRAMES, rate_hz=10))
    for i, frame in enumerate(FRAMES):
        alone = image.encode(Image(frame))
        assert np.array_equal(tokens.codes[i * 15 : (i + 1) * 15], alone.codes)
    decoded = video.decode(tokens.codes, tokens.grid, rate_hz=10, size=(5, 9))
    assert decoded.frames.shape == (5, 5, 9, 3) and decoded.rate_hz == 10
    expect = image.decode(tokens.codes[15:30], (3, 5)).pixels[:5, :9]
    assert np.allclose(decoded.frames[1], expect, atol=1e-6)


@pytest.mark.parametrize("config", [VideoConfig(patch=3), VideoConfig(patch=2, temporal=2), VideoConfig(patch=2, channels=1)])
def test_other_patches_are_input_only(image: ImageTokenizer, config: VideoConfig) -> None:
    tokenizer = VideoTokenizer(config, image)
    assert tokenizer.size == 0
    assert (tokenizer.encode(Video(FRAMES, rate_hz=10)).codes == -1).all()
    with pytest.raises(TokenizerError, match="input only"):
        tokenizer.decode(np.zeros(15, np.int64), (1, 3, 5))


def test_times_of_every_kind_are_kept() -> None:
    tokenizer = VideoTokenizer(VideoConfig(patch=10))
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    expect = [0, 40 * MS, 200 * MS, 300 * MS, 1000 * MS]
    for segment in (
        Video(FRAMES, times=expect),
        Video(FRAMES, times=[0.0, 0.04, 0.2, 0.3, 1.0]),
        Video(FRAMES, times=[begin + timedelta(milliseconds=t // MS) for t in expect], start=begin),
        Video(samples.video_bytes(5, times_ms=[t // MS for t in expect])),
    ):
        times = tokenizer.encode(segment).time
        assert times[:: len(times) // 5].tolist() == expect


def test_a_rate_cap_thins_arrays_and_files_alike() -> None:
    tokenizer = VideoTokenizer(VideoConfig(patch=10, max_rate_hz=5))
    for segment in (Video(FRAMES, rate_hz=10), Video(samples.video_bytes(5))):
        tokens = tokenizer.encode(segment)
        assert tokens.grid[0] == 3
        assert np.unique(tokens.time).tolist() == [0, 200 * MS, 400 * MS]


def test_times_of_a_file_can_be_replaced() -> None:
    times = VideoTokenizer().encode(Video(samples.video_bytes(3), rate_hz=2)).time
    assert np.unique(times).tolist() == [0, 500 * MS, 1000 * MS]


@pytest.mark.parametrize(
    "segment",
    [
        Video(FRAMES, name="cam"),
        Video(FRAMES, name="cam", times=[0.0, 1.0]),
        Video(FRAMES, name="cam", times=[0.0, 2.0, 1.0, 3.0, 4.0]),
        Video(FRAMES, name="cam", times=[0.0, 1.0, float("nan"), 3.0, 4.0]),
        Video(FRAMES, name="cam", rate_hz=0.0),
        Video(FRAMES, name="cam", times=[datetime(2026, 1, 1)] * 5),
    ],
)
def test_bad_clocks_are_refused_with_the_name(segment: Video) -> None:
    with pytest.raises(ValueError, match="'cam'"):
        VideoTokenizer().encode(segment)


def test_save_and_load(image: ImageTokenizer, tmp_path: Path) -> None:
    for i, tokenizer in enumerate((VideoTokenizer(VideoConfig(patch=2), image), VideoTokenizer(VideoConfig(temporal=2)))):
        tokenizer.save(tmp_path / str(i))
        loaded = VideoTokenizer.load(tmp_path / str(i))
        assert isinstance(loaded, Tokenizer) and loaded.digest() == tokenizer.digest() and loaded.size == tokenizer.size
        segment = Video(FRAMES, rate_hz=10)
        assert np.array_equal(loaded.encode(segment).codes, tokenizer.encode(segment).codes)


@pytest.mark.parametrize("grid", [(1, 15), (2, 3, 5), (1, 3, 5)])
def test_impossible_codes_are_refused(image: ImageTokenizer, grid: tuple[int, ...]) -> None:
    with pytest.raises(TokenizerError):
        VideoTokenizer(VideoConfig(patch=2), image).decode(np.full(15, 45), grid)
