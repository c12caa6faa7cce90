"""Audio tokenizer: tokens lie on the clock, mel frames invert, a fitted codec keeps the sound's pitch and loudness."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.base import Tokenizer
from weft.tokenizers.codec_fit import CodecFit, CodecReport
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.mel import MelConfig
from weft.tokenizers.pictures import mel_pairs
from weft.tokenizers.segment import Audio, Text

sys.path.insert(0, str(Path(__file__).parent))
import media_samples as samples

CONFIG = AudioConfig(sample_rate_hz=8000, n_mels=40, hop=80, win=200, frames_per_token=2)


def tones(count: int, seed: int = 0) -> list[Audio]:
    """Half a second of harmonic sound at random pitches and loudness."""
    random = np.random.default_rng(seed)
    t = np.arange(4000) / 8000
    out = []
    for _ in range(count):
        hz, level = random.uniform(100, 600), random.uniform(0.05, 0.3)
        sound = level * sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 5)) * np.hanning(4000)
        out.append(Audio(sound.astype(np.float32), rate_hz=8000.0))
    return out


@pytest.fixture(scope="module")
def fitted() -> tuple[AudioTokenizer, CodecReport]:
    return AudioTokenizer.fit(tones(150), CONFIG, fit=CodecFit(steps=250))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.sampled_from([8000, 11025, 16000, 44100]), st.integers(1, 5))
def test_any_length_gives_whole_tokens_on_the_clock(count: int, rate_hz: int, frames_per_token: int) -> None:
    config = dataclasses.replace(CONFIG, frames_per_token=frames_per_token)
    tokens = AudioTokenizer(config).encode(Audio(np.zeros(count, np.float32), rate_hz=rate_hz))
    length = -(-count * 8000 // rate_hz)
    assert tokens.grid == (len(tokens),) and abs(len(tokens) - max(1, -(-length // (80 * frames_per_token)))) <= (
        rate_hz != 8000
    )
    assert tokens.time.tolist() == [k * frames_per_token * 10_000_000 for k in range(len(tokens))]
    assert tokens.features is not None and tokens.features.shape == (len(tokens), frames_per_token * 40)
    assert np.isfinite(tokens.features).all() and (tokens.codes == -1).all()


def test_a_click_lands_in_the_token_of_its_time() -> None:
    sound = np.zeros(8000, np.float32)
    sound[3650] = 1.0  # token 22 covers samples 3520..3679
    tokens = AudioTokenizer(CONFIG).encode(Audio(sound, rate_hz=8000))
    assert tokens.features is not None and int(tokens.features.mean(axis=1).argmax()) == 22
    assert tokens.time[22] == 440_000_000


def test_a_tone_is_loudest_in_its_own_band() -> None:
    config = MelConfig(16000, 40, 160, 400)
    for hz in (300, 1000, 3000):
        mel = config.frames(samples.tone(0.5, 16000, hz)[:, 0], 50)
        band = int(mel.mean(axis=0).argmax())
        peak = config.filters[:, band].argmax() * 16000 / config.n_fft
        assert abs(peak - hz) < 0.15 * hz


@pytest.mark.parametrize(
    "config", [MelConfig(8000, 40, 80, 200), MelConfig(16000, 80, 160, 400), MelConfig(22050, 80, 256, 1024)]
)
def test_mel_frames_invert_to_sound_with_the_same_mel(config: MelConfig) -> None:
    rate = config.sample_rate_hz
    sound = samples.tone(0.5, rate, 440)[:, 0] + 0.01 * np.random.default_rng(0).standard_normal(rate // 2).astype(np.float32)
    count = len(sound) // config.hop
    mel = config.frames(sound, count)
    back = config.samples(mel)
    assert back.shape == (count * config.hop,) and np.abs(back).max() <= 1
    assert abs(back.std() / sound.std() - 1) < 0.1
    assert np.abs(np.fft.rfft(back)).argmax() == pytest.approx(440 * len(back) / rate, abs=6)
    assert np.abs(config.frames(back, count) - mel)[3:-3].mean() < 0.35
    assert np.array_equal(back, config.samples(mel)), "Griffin-Lim must not depend on the global random state"


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_very_short_sounds_invert_too(count: int) -> None:
    assert MelConfig(8000, 20, 40, 400).samples(np.zeros((count, 20), np.float32)).shape == (count * 40,)


def test_the_codec_keeps_pitch_and_loudness(fitted: tuple[AudioTokenizer, CodecReport]) -> None:
    tokenizer, report = fitted
    assert tokenizer.size == 1000 and report.mse < 0.1, "features have unit variance"
    assert 0 < tokenizer.mel_error_db(report) < 6
    assert tokenizer.measure(tones(20, seed=1)).mse < 0.15
    sound = tones(1, seed=2)[0]
    tokens = tokenizer.encode(sound)
    decoded = tokenizer.decode(tokens.codes, tokens.grid, samples=4000)
    assert decoded.rate_hz == 8000 and decoded.samples.shape == (4000,) and decoded.samples.dtype == np.float32
    assert 0.3 < decoded.samples.std() / sound.samples.std() < 2
    before, after = (np.abs(np.fft.rfft(s)).argmax() for s in (sound.samples, decoded.samples))
    assert abs(int(before) - int(after)) < 25  # 50 Hz


def test_features_are_normalised_by_the_fitted_data(fitted: tuple[AudioTokenizer, CodecReport]) -> None:
    values = np.concatenate([fitted[0].features(s) for s in tones(150)])
    assert abs(values.mean()) < 1e-3 and abs(values.std() - 1) < 1e-3


def test_many_at_once_equal_each_alone(fitted: tuple[AudioTokenizer, CodecReport]) -> None:
    segments = [Audio(s.samples[: 300 * i], rate_hz=8000) for i, s in enumerate(tones(9))]
    for segment, tokens in zip(segments, fitted[0].encode_many(iter(segments)), strict=True):
        assert np.array_equal(fitted[0].encode(segment).codes, tokens.codes)


def test_a_vocoder_takes_the_place_of_griffin_lim(fitted: tuple[AudioTokenizer, CodecReport], tmp_path: Path) -> None:
    fitted[0].save(tmp_path)
    seen: list[tuple[tuple[int, ...], int]] = []

    def vocoder(mel: np.ndarray, rate_hz: int) -> np.ndarray:
        seen.append((mel.shape, rate_hz))
        return np.full(len(mel) * 80, 2.0)

    tokenizer = AudioTokenizer.load(tmp_path, vocoder=vocoder)
    sound = tokenizer.decode(np.zeros(3, np.int64), (3,))
    assert seen == [((6, 40), 8000)]
    assert sound.samples.shape == (480,) and (sound.samples == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 999), max_size=12))
def test_any_codes_decode_to_finite_sound_in_range(codes: list[int]) -> None:
    if not _made:
        _made.append(AudioTokenizer.fit(tones(3), CONFIG, fit=CodecFit(steps=2))[0])
    sound = _made[0].decode(np.array(codes, np.int64), (len(codes),)).samples
    assert sound.shape == (len(codes) * 160,) and np.isfinite(sound).all() and np.abs(sound).max(initial=0) <= 1


_made: list[AudioTokenizer] = []


def test_files_bytes_and_arrays_agree(tmp_path: Path) -> None:
    data = samples.audio_bytes("wav", subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    tokenizer = AudioTokenizer(CONFIG)
    expect = tokenizer.features(Audio(samples.tone()[:, 0], rate_hz=8000))
    for source in (data, tmp_path / "a.wav", str(tmp_path / "a.wav")):
        assert np.allclose(tokenizer.features(Audio(source)), expect, atol=1e-5)


def test_save_and_load(fitted: tuple[AudioTokenizer, CodecReport], tmp_path: Path) -> None:
    for i, tokenizer in enumerate((fitted[0], AudioTokenizer(CONFIG))):
        tokenizer.save(tmp_path / str(i))
        loaded = AudioTokenizer.load(tmp_path / str(i))
        assert isinstance(loaded, Tokenizer) and loaded.digest() == tokenizer.digest() and loaded.config == tokenizer.config
        assert np.array_equal(loaded.encode(tones(1)[0]).codes, tokenizer.encode(tones(1)[0]).codes)


def test_without_a_codec_generating_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TokenizerError, match=r"input only.*AudioTokenizer\.fit"):
        AudioTokenizer(CONFIG).decode(np.zeros(1, np.int64), (1,))
    with pytest.raises(TokenizerError, match="no sound"):
        AudioTokenizer.fit([])


def test_bad_configs_are_refused() -> None:
    for field, value in (("sample_rate_hz", 10), ("hop", 500), ("n_mels", 0), ("frames_per_token", 0), ("std", 0.0)):
        with pytest.raises(TokenizerError, match=field):
            dataclasses.replace(AudioConfig(), **{field: value})
    with pytest.raises(TokenizerError, match="lower n_mels"):
        AudioConfig(n_mels=300)
    with pytest.raises(TokenizerError, match="got Text"):
        AudioTokenizer(CONFIG).encode(Text("x"))


def test_spectrograms_lie_side_by_side(fitted: tuple[AudioTokenizer, CodecReport], tmp_path: Path) -> None:
    path = mel_pairs(fitted[0], tones(3), tmp_path / "mel.png", zoom=1)
    with PIL.Image.open(path) as page:
        assert page.size == (3 * (50 + 4), 2 * (40 + 4))
