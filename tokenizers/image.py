"""Images <-> patch tokens: p x p pixels each, raster order, any aspect ratio.

In: an `Image` segment. Out: `Tokens` with features = the patch's pixels (row, column, channel order) brought from [0, 1] to
about unit variance (`standardise`), grid = patches (h, w), place = (row, column). Right and bottom edges are repeated up to
a whole patch; `decode(..., size=)` crops.
Codes come from an FSQ codec fitted on the user's images; without one the tokenizer is input only (codes -1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers import files
from weft.tokenizers.base import Tokens
from weft.tokenizers.clock import label
from weft.tokenizers.codec import Codec, CodecConfig, codec_settings, encode_all, saved_codec
from weft.tokenizers.codec_fit import CodecFit, CodecReport, Progress, fit_codec, measure
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.media.image import fit_within, load_image
from weft.tokenizers.media.limits import DEFAULT, Limits
from weft.tokenizers.segment import Image, Segment


@dataclass(frozen=True)
class ImageConfig:
    """What becomes of an image before it is cut into patches."""

    patch: int = 16
    """Side of a patch in pixels."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    max_side: int | None = None
    """Larger images are shrunk until no side exceeds this many pixels; sets the token budget of a photo."""

    def __post_init__(self) -> None:
        if not isinstance(self.patch, int) or not 1 <= self.patch <= 256:
            raise TokenizerError(f"image patch {self.patch} must be an integer from 1 to 256 pixels")
        if self.channels not in (1, 3):
            raise TokenizerError(f"image channels {self.channels} must be 1 or 3")
        if self.max_side is not None and not 1 <= self.max_side <= 8192:
            raise TokenizerError(f"image max_side {self.max_side} must be from 1 to 8192 pixels")


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """float32 [... H W C] -> [... h w p*p*C]; the last row and column are repeated up to a whole patch."""
    height, width, channels = pixels.shape[-3:]
    h, w = -(-height // patch), -(-width // patch)
    if (h * patch, w * patch) != (height, width):
        edge = [(0, 0)] * (pixels.ndim - 3) + [(0, h * patch - height), (0, w * patch - width), (0, 0)]
        pixels = np.pad(pixels, edge, mode="edge")
    lead = pixels.shape[:-3]
    cut = pixels.reshape(*lead, h, patch, w, patch, channels).swapaxes(-4, -3)
    return cut.reshape(*lead, h, w, patch * patch * channels)


def unpatchify(features: np.ndarray, patch: int, channels: int) -> np.ndarray:
    """float32 [... h w p*p*C] -> [... h*p w*p C]."""
    *lead, h, w, _ = features.shape
    cut = features.reshape(*lead, h, w, patch, patch, channels).swapaxes(-4, -3)
    return cut.reshape(*lead, h * patch, w * patch, channels)


def standardise(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] -> features in [-2, 2]: as large as embeddings, so that a model sees them from the first step."""
    return np.asarray((pixels - 0.5) * 4, np.float32)


def unstandardise(features: np.ndarray) -> np.ndarray:
    """Features back to pixels in [0, 1]."""
    return np.asarray(features / 4 + 0.5, np.float32)


def raster(h: int, w: int) -> np.ndarray:
    """int32 [h*w 2]: row and column of each patch."""
    return np.stack(np.divmod(np.arange(h * w, dtype=np.int32), np.int32(max(w, 1))), axis=1).astype(np.int32)


class ImageTokenizer:
    """Pixels to patches and, with a fitted codec, patches to codes and back."""

    modality = "image"

    def __init__(self, config: ImageConfig | None = None, codec: Codec | None = None, limits: Limits = DEFAULT) -> None:
        self.config, self.codec, self.limits = config or ImageConfig(), codec, limits
        self.feature_size = self.config.patch**2 * self.config.channels
        self.size = codec.size if codec else 0
        if codec and codec.feature_size != self.feature_size:
            raise TokenizerError(f"the codec has {codec.feature_size} features, the image config needs {self.feature_size}")

    def pixels(self, segment: Segment) -> np.ndarray:
        """float32 [H W C]: the decoded image, shrunk to `max_side`."""
        if not isinstance(segment, Image):
            raise TokenizerError(f"ImageTokenizer encodes Image, got {type(segment).__name__}")
        pixels = load_image(segment.pixels, self.config.channels, self.limits)
        if not pixels.size:
            raise TokenizerError(f"{label(segment)} has no pixels; give at least 1x1")
        return fit_within(pixels, self.config.max_side)

    def encode(self, segment: Segment) -> Tokens:
        """Tokens of an `Image` segment."""
        return self._tokens([patchify(self.pixels(segment), self.config.patch)])[0]

    def encode_many(self, segments: Iterable[Segment]) -> list[Tokens]:
        """Tokens of many images, with one call of the codec: the same as `encode` of each."""
        return self._tokens([patchify(self.pixels(s), self.config.patch) for s in segments])

    def _tokens(self, grids: Sequence[np.ndarray]) -> list[Tokens]:
        features = [g.reshape(-1, self.feature_size) for g in grids]
        return [
            Tokens(
                codes=c,
                grid=g.shape[:2],
                time=np.zeros(len(f), np.int64),
                features=standardise(f),
                place=raster(*g.shape[:2]),
                group=len(f),
            )
            for c, g, f in zip(encode_all(self.codec, features), grids, features)
        ]

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Image:
        """Codes [h*w] to an image of float32 pixels [H W C]; `size=(height, width)` crops the padding."""
        codec = self._fitted()
        if len(grid) != 2 or min(grid) < 1:
            raise TokenizerError(f"an image grid is (h, w), each at least 1, got {tuple(grid)}")
        codes = files.checked_codes(codes, self.size, grid, "image")
        features = codec.decode(codes, (grid[0], grid[1])).reshape(*grid, -1)
        pixels = np.clip(unpatchify(features, self.config.patch, self.config.channels), 0, 1)
        height, width = shape.get("size") or pixels.shape[:2]
        return Image(pixels=pixels[:height, :width])

    def _fitted(self) -> Codec:
        if self.codec is None:
            raise TokenizerError(
                "this image tokenizer is input only: it has no codec; call ImageTokenizer.fit(images) to generate images"
            )
        return self.codec

    @classmethod
    def fit(
        cls,
        images: Iterable[Any],
        config: ImageConfig | None = None,
        codec: CodecConfig | None = None,
        fit: CodecFit | None = None,
        *,
        progress: Progress | None = None,
        limits: Limits = DEFAULT,
    ) -> tuple[ImageTokenizer, CodecReport]:
        """A tokenizer whose codec was trained on `images` (segments, or whatever `Image` accepts), and how well it does."""
        plain = cls(config, limits=limits)
        segments = (s if isinstance(s, Image) else Image(s) for s in images)
        grids = [patchify(plain.pixels(s), plain.config.patch) for s in segments]
        fitted, report = fit_codec(grids, codec or CodecConfig(), fit or CodecFit(), progress)
        return cls(config, fitted, limits), report

    def measure(self, images: Iterable[Any]) -> CodecReport:
        """Reconstruction error and code usage on other images."""
        segments = (s if isinstance(s, Image) else Image(s) for s in images)
        return measure(self._fitted(), [patchify(self.pixels(s), self.config.patch) for s in segments])

    def _state(self) -> tuple[dict[str, Any], files.Arrays]:
        settings = {"modality": self.modality, "config": asdict(self.config), **codec_settings(self.codec)}
        return settings, self.codec.arrays() if self.codec else {}

    def save(self, folder: Path) -> None:
        """Write settings and, if fitted, the codec."""
        files.write(folder, *self._state())

    @classmethod
    def load(cls, folder: Path) -> ImageTokenizer:
        """Read what `save` wrote."""
        settings, arrays = files.read(folder, "image")
        plain = cls(files.config_from(ImageConfig, settings.get("config"), str(folder)))
        return cls(plain.config, saved_codec(settings, arrays, plain.feature_size, str(folder)))

    def digest(self) -> str:
        """SHA-256 over the config and the codec."""
        return files.digest(*self._state())
