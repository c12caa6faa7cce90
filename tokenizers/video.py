"""Video <-> patch tokens: frames at their own times, `temporal` frames and p x p pixels per token.

In: a `Video` segment. Out: `Tokens` with features [n tp*p*p*C], grid (frames', h, w), time = that of a token's first frame,
place = (row, column). With temporal = 1 and the image tokenizer's patch and channels a frame is coded as an image is, in
the image's span; otherwise video is input only (codes -1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers import files
from weft.tokenizers.base import Tokens
from weft.tokenizers.clock import label, segment_times
from weft.tokenizers.codec import Codec, codec_settings, saved_codec
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.image import ImageTokenizer, patchify, raster, standardise, unpatchify
from weft.tokenizers.media.limits import DEFAULT, Limits
from weft.tokenizers.media.video import load_video
from weft.tokenizers.segment import Segment, Video


@dataclass(frozen=True)
class VideoConfig:
    """What becomes of a video before it is cut into patches."""

    patch: int = 16
    """Side of a patch in pixels."""
    temporal: int = 1
    """Frames per token; the last frame is repeated up to a whole token."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    max_side: int | None = None
    """Larger frames are shrunk until no side exceeds this many pixels."""
    max_rate_hz: float | None = None
    """Frames that follow a kept frame more closely are dropped; sets the token budget of a second."""

    def __post_init__(self) -> None:
        if not isinstance(self.patch, int) or not 1 <= self.patch <= 256:
            raise TokenizerError(f"video patch {self.patch} must be an integer from 1 to 256 pixels")
        if not isinstance(self.temporal, int) or not 1 <= self.temporal <= 64:
            raise TokenizerError(f"video temporal {self.temporal} must be an integer from 1 to 64 frames")
        if self.channels not in (1, 3):
            raise TokenizerError(f"video channels {self.channels} must be 1 or 3")
        if self.max_side is not None and not 1 <= self.max_side <= 8192:
            raise TokenizerError(f"video max_side {self.max_side} must be from 1 to 8192 pixels")
        if self.max_rate_hz is not None and not 0 < self.max_rate_hz <= 1000:
            raise TokenizerError(f"video max_rate_hz {self.max_rate_hz} must be above 0 and at most 1000 frames per second")


class VideoTokenizer:
    """Frames to patches; codes through the image tokenizer's codec where the patches agree."""

    modality = "video"

    def __init__(
        self, config: VideoConfig | None = None, image: ImageTokenizer | None = None, limits: Limits = DEFAULT
    ) -> None:
        self.config, self.limits = config or VideoConfig(), limits
        self.feature_size = self.config.temporal * self.config.patch**2 * self.config.channels
        same = image and (image.config.patch, image.config.channels, 1) == (
            self.config.patch,
            self.config.channels,
            self.config.temporal,
        )
        self.codec: Codec | None = image.codec if image and same else None
        self.size = self.codec.size if self.codec else 0

    def frames(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """float32 [N H W C] kept frames and int64 [N] ns after the segment's start."""
        if not isinstance(segment, Video):
            raise TokenizerError(f"VideoTokenizer encodes Video, got {type(segment).__name__}")
        config = self.config
        own_clock = segment.rate_hz is None and segment.times is None
        rate = config.max_rate_hz if own_clock else None
        frames, clock = load_video(segment.frames, config.channels, config.max_side, rate, self.limits)
        if not frames.size:
            raise TokenizerError(f"{label(segment)} has frames without pixels; give at least 1x1")
        if clock is not None and own_clock:
            return frames, clock
        times = segment_times(segment, len(frames))
        keep = _thin(times, config.max_rate_hz)
        return frames[keep], times[keep]

    def encode(self, segment: Segment) -> Tokens:
        """Tokens of a `Video` segment."""
        frames, times = self.frames(segment)
        tp = self.config.temporal
        if short := -len(frames) % tp:
            frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
        patches = patchify(frames, self.config.patch)
        steps, (h, w) = len(frames) // tp, patches.shape[1:3]
        # [steps tp h w F] -> [steps h w tp F]
        features = patches.reshape(steps, tp, h, w, -1).transpose(0, 2, 3, 1, 4).reshape(steps * h * w, -1)
        codes = self.codec.encode(features) if self.codec else np.full(len(features), -1, np.int64)
        return Tokens(
            codes=codes,
            grid=(steps, h, w),
            time=np.repeat(times[::tp], h * w),
            features=standardise(features),
            place=np.tile(raster(h, w), (steps, 1)),
            group=h * w,
        )

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Video:
        """Codes [frames*h*w] to float32 frames [N H W C].

        `size=(height, width)` crops the padding; `times` (one per frame) or `rate_hz` are handed on to the segment.
        """
        if self.codec is None:
            raise TokenizerError(
                "this video tokenizer is input only: give it a fitted ImageTokenizer of the same patch and channels, temporal=1"
            )
        if len(grid) != 3 or min(grid) < 1:
            raise TokenizerError(f"a video grid is (frames, h, w), each at least 1, got {tuple(grid)}")
        codes = files.checked_codes(codes, self.size, grid, "video")
        frames = [
            self.codec.decode(c, (grid[1], grid[2])).reshape(grid[1], grid[2], -1)
            for c in codes.reshape(grid[0], grid[1] * grid[2])
        ]
        pixels = np.clip(unpatchify(np.stack(frames), self.config.patch, self.config.channels), 0, 1)
        height, width = shape.get("size") or pixels.shape[1:3]
        return Video(frames=pixels[:, :height, :width], rate_hz=shape.get("rate_hz"), times=shape.get("times"))

    def with_image(self, image: ImageTokenizer) -> VideoTokenizer:
        """The same tokenizer, coding frames with `image`'s codec where the patches agree."""
        return VideoTokenizer(self.config, image, self.limits)

    def _state(self) -> tuple[dict[str, Any], files.Arrays]:
        settings = {"modality": self.modality, "config": asdict(self.config), **codec_settings(self.codec)}
        return settings, self.codec.arrays() if self.codec else {}

    def save(self, folder: Path) -> None:
        """Write settings and, if there is one, the codec."""
        files.write(folder, *self._state())

    @classmethod
    def load(cls, folder: Path) -> VideoTokenizer:
        """Read what `save` wrote."""
        settings, arrays = files.read(folder, "video")
        tokenizer = cls(files.config_from(VideoConfig, settings.get("config"), str(folder)))
        tokenizer.codec = saved_codec(settings, arrays, tokenizer.feature_size, str(folder))
        tokenizer.size = tokenizer.codec.size if tokenizer.codec else 0
        return tokenizer

    def digest(self) -> str:
        """SHA-256 over the config and the codec."""
        return files.digest(*self._state())


def _thin(times: np.ndarray, max_rate_hz: float | None) -> np.ndarray:
    """int64 [k]: frames to keep so that each follows the kept one before it by at least 1 / max_rate_hz."""
    if max_rate_hz is None:
        return np.arange(len(times))
    keep, gap = [0], 1e9 / max_rate_hz * 0.999
    for i in range(1, len(times)):
        if times[i] - times[keep[-1]] >= gap:
            keep.append(i)
    return np.array(keep, np.int64)
