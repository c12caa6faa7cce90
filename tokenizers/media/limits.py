"""How large a medium may be. Every figure is checked while decoding; what a header claims is never trusted."""

from __future__ import annotations

from dataclasses import dataclass, fields

from weft.tokenizers.media.errors import MediaError


@dataclass(frozen=True)
class Limits:
    """Defaults that keep one file's memory below about 256 MiB."""

    file_bytes: int = 256 << 20
    """Encoded size."""
    image_side: int = 8192
    """Pixels of an image's or frame's longer side."""
    image_pixels: int = 16_000_000
    """Pixels of one image or frame."""
    audio_seconds: float = 600.0
    audio_channels: int = 8
    audio_rate_min_hz: int = 8_000
    audio_rate_max_hz: int = 192_000
    video_frames: int = 1024
    """Frames kept, after thinning to a frame rate."""
    video_pixels: int = 64_000_000
    """Pixels of all kept frames together."""
    video_seconds: float = 10.0
    """Wall time for decoding one video."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limit {field.name}={getattr(self, field.name)} must be above 0")

    def check_image(self, width: int, height: int, name: str) -> None:
        """Refuse an image of this size before its pixels are decoded."""
        if not (1 <= width <= self.image_side and 1 <= height <= self.image_side):
            raise MediaError(f"{name} is {width}x{height}, sides from 1 to {self.image_side} are allowed; resize it")
        if width * height > self.image_pixels:
            raise MediaError(
                f"{name} is {width}x{height} = {width * height} pixels, at most {self.image_pixels} are allowed; resize it"
            )


DEFAULT = Limits()


def read_bytes(source: object, limits: Limits, name: str) -> bytes:
    """The encoded bytes of a path or of a bytes-like object, at most `file_bytes` of them."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:
        with open(source, "rb") as file:  # type: ignore[call-overload]
            data = file.read(limits.file_bytes + 1)
    if len(data) > limits.file_bytes:
        raise MediaError(f"{name} is larger than {limits.file_bytes} bytes; compress it or raise the limit")
    if not data:
        raise MediaError(f"{name} is empty; write the file again")
    return data
