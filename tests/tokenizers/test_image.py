"""Image tokenizer: patches tile the image exactly; a fitted codec codes small scans well; without one it is input only."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.base import Tokenizer
from weft.tokenizers.codec import CodecConfig
from weft.tokenizers.codec_fit import CodecFit, CodecReport
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.image import ImageConfig, ImageTokenizer, patchify, standardise, unpatchify
from weft.tokenizers.pictures import image_pairs
from weft.tokenizers.segment import Image, Text

sys.path.insert(0, str(Path(__file__).parent))
import media_samples as samples


def digits(count: int) -> np.ndarray:
    """float32 [N 8 8]: blurred strokes at random places, like small scans."""
    random = np.random.default_rng(count)
    y, x = np.mgrid[0:8, 0:8]
    out = np.zeros((count, 8, 8))
    for _ in range(3):
        cy, cx, angle = (
            random.uniform(1, 7, (count, 1, 1)),
            random.uniform(1, 7, (count, 1, 1)),
            random.uniform(0, 3.14, (count, 1, 1)),
        )
        across = (x - cx) * np.sin(angle) - (y - cy) * np.cos(angle)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        out = np.maximum(out, np.exp(-(across**2) / 0.7 - along**2 / 8))
    return out.astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> tuple[ImageTokenizer, CodecReport]:
    return ImageTokenizer.fit(list(digits(400)), ImageConfig(patch=2, channels=1), fit=CodecFit(steps=300))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.sampled_from([1, 2, 3, 5, 16]), st.sampled_from([1, 3]))
def test_patches_tile_any_image_and_cropping_gives_it_back(height: int, width: int, patch: int, channels: int) -> None:
    pixels = np.random.default_rng(0).random((height, width, channels), np.float32)
    tokens = ImageTokenizer(ImageConfig(patch=patch, channels=channels)).encode(Image(pixels))
    h, w = tokens.grid
    assert (h, w) == (-(-height // patch), -(-width // patch))
    assert tokens.features is not None and tokens.features.shape == (h * w, patch * patch * channels)
    assert len(tokens) == tokens.group == h * w and (tokens.codes == -1).all() and not tokens.time.any()
    back = unpatchify(tokens.features.reshape(h, w, -1), patch, channels)
    assert np.array_equal(back[:height, :width], standardise(pixels))
    assert tokens.place is not None and tokens.place.dtype == np.int32
    assert tokens.place.tolist() == [[i, j] for i in range(h) for j in range(w)]


def test_a_patch_holds_its_own_pixels_in_raster_order() -> None:
    pixels = np.arange(6 * 10 * 3, dtype=np.float32).reshape(6, 10, 3)
    grid = patchify(pixels, 2)
    assert np.array_equal(grid[1, 3], pixels[2:4, 6:8].ravel())


def test_the_edge_is_repeated_not_blackened() -> None:
    tokens = ImageTokenizer(ImageConfig(patch=4, channels=1)).encode(Image(np.ones((5, 3), np.float32)))
    assert tokens.features is not None and (tokens.features == 2).all()


def test_max_side_sets_the_token_budget() -> None:
    tokenizer = ImageTokenizer(ImageConfig(patch=8, max_side=64))
    assert tokenizer.encode(Image(samples.picture(300, 400))).grid == (6, 8)


def test_small_scans_are_kept_and_the_report_says_how_well(fitted: tuple[ImageTokenizer, CodecReport]) -> None:
    tokenizer, report = fitted
    assert tokenizer.size == 1000 and report.mse < 0.005
    other = tokenizer.measure(list(digits(100)))
    assert other.mse < 0.005 and abs(other.psnr_db + 10 * np.log10(other.mse)) < 1e-9
    image = digits(100)[7]
    tokens = tokenizer.encode(Image(image))
    decoded = tokenizer.decode(tokens.codes, tokens.grid)
    assert decoded.pixels.shape == (8, 8, 1) and decoded.pixels.dtype == np.float32
    assert np.square(decoded.pixels[..., 0] - image).mean() < 0.01
    assert decoded.pixels.min() >= 0 and decoded.pixels.max() <= 1


def test_size_crops_the_padding(fitted: tuple[ImageTokenizer, CodecReport]) -> None:
    tokens = fitted[0].encode(Image(digits(1)[0, :5, :7]))
    assert tokens.grid == (3, 4)
    assert fitted[0].decode(tokens.codes, tokens.grid).pixels.shape == (6, 8, 1)
    assert fitted[0].decode(tokens.codes, tokens.grid, size=(5, 7)).pixels.shape == (5, 7, 1)


def test_many_at_once_equal_each_alone(fitted: tuple[ImageTokenizer, CodecReport]) -> None:
    segments = [Image(d[: 3 + i % 6]) for i, d in enumerate(digits(50))]
    many = fitted[0].encode_many(iter(segments))
    for segment, tokens in zip(segments, many, strict=True):
        alone = fitted[0].encode(segment)
        assert np.array_equal(alone.codes, tokens.codes) and alone.grid == tokens.grid
    assert fitted[0].encode_many([]) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_any_codes_on_any_grid_decode_to_pixels_in_range(h: int, w: int, seed: int) -> None:
    tokenizer = _random_codec()
    codes = np.random.default_rng(seed).integers(0, tokenizer.size, h * w)
    pixels = tokenizer.decode(codes, (h, w)).pixels
    assert pixels.shape == (h * 2, w * 2, 1) and np.isfinite(pixels).all()
    assert pixels.min() >= 0 and pixels.max() <= 1


_made: list[ImageTokenizer] = []


def _random_codec() -> ImageTokenizer:
    if not _made:
        config = ImageConfig(patch=2, channels=1)
        _made.append(ImageTokenizer.fit(list(digits(5)), config, CodecConfig(levels=(5, 3)), CodecFit(steps=2))[0])
    return _made[0]


def test_without_a_codec_generating_is_an_error_that_says_what_to_do() -> None:
    tokenizer = ImageTokenizer()
    assert tokenizer.size == 0 and tokenizer.feature_size == 16 * 16 * 3
    with pytest.raises(TokenizerError, match=r"input only.*ImageTokenizer\.fit"):
        tokenizer.decode(np.zeros(1, np.int64), (1, 1))


@pytest.mark.parametrize(
    ("codes", "grid"), [([1000], (1, 1)), ([-1], (1, 1)), ([1], (2, 1)), ([1], (1,)), ([], (0, 3)), ([0.5], (1, 1))]
)
def test_impossible_codes_are_refused(
    fitted: tuple[ImageTokenizer, CodecReport], codes: list[float], grid: tuple[int, ...]
) -> None:
    with pytest.raises(TokenizerError):
        fitted[0].decode(np.array(codes), grid)


def test_save_and_load_keep_codes_pixels_and_digest(fitted: tuple[ImageTokenizer, CodecReport], tmp_path: Path) -> None:
    tokenizer = fitted[0]
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.safetensors"]
    loaded = ImageTokenizer.load(tmp_path)
    assert isinstance(loaded, Tokenizer) and loaded.digest() == tokenizer.digest()
    tokens = tokenizer.encode(Image(digits(1)[0]))
    assert np.array_equal(loaded.encode(Image(digits(1)[0])).codes, tokens.codes)
    assert np.array_equal(loaded.decode(tokens.codes, tokens.grid).pixels, tokenizer.decode(tokens.codes, tokens.grid).pixels)
    assert ImageTokenizer(tokenizer.config).digest() != tokenizer.digest()


def test_damaged_settings_are_refused(tmp_path: Path) -> None:
    ImageTokenizer().save(tmp_path)
    settings_file = tmp_path / "tokenizer.json"
    good = json.loads(settings_file.read_text())
    for change, needle in (
        ({"modality": "audio"}, "'audio' tokenizer"),
        ({"config": {"pach": 2}}, "unknown config key 'pach'"),
        ({"config": {"patch": 0}}, "patch"),
        ({"config": 3}, "JSON object"),
    ):
        settings_file.write_text(json.dumps(good | change))
        with pytest.raises(TokenizerError, match=needle):
            ImageTokenizer.load(tmp_path)
    settings_file.write_text("{")
    with pytest.raises(TokenizerError, match="not a readable"):
        ImageTokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="save the image tokenizer there"):
        ImageTokenizer.load(tmp_path / "nowhere")


def test_pictures_lie_side_by_side(fitted: tuple[ImageTokenizer, CodecReport], tmp_path: Path) -> None:
    path = image_pairs(fitted[0], [Image(d) for d in digits(5)], tmp_path / "pairs.png", side=16)
    with PIL.Image.open(path) as page:
        assert page.size == (5 * 20, 2 * 20)


def test_other_segments_and_bad_configs_are_refused() -> None:
    with pytest.raises(TokenizerError, match="got Text"):
        ImageTokenizer().encode(Text("x"))
    for field, value in (("patch", 0), ("patch", 2.5), ("channels", 4), ("max_side", 0)):
        with pytest.raises(TokenizerError, match=field):
            dataclasses.replace(ImageConfig(), **{field: value})
