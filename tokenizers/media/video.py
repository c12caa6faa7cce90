"""Video sources -> float32 frames [N H W C] in [0, 1] and the time of each.

In: path or bytes (MP4), a folder of frames (PNG, JPEG, WebP in the order of their names), an array [N H W C] or [N H W]
(torch too), or a list of images. A file brings its own frame times, whatever their spacing, and is turned upright by its
display matrix; folders, arrays and lists take their times from the segment. Decoder: torchcodec where it and a system FFmpeg
are usable, else PyAV, which brings FFmpeg.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.media.errors import MediaError, border, source_name
from weft.tokenizers.media.image import fit_within, load_image, scale_pixels, to_channels
from weft.tokenizers.media.limits import DEFAULT, Limits, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
REPAIR = "save it again as MP4 (H.264), or hand in a folder of frames"
Frame = tuple[int | None, np.ndarray]
"""(nanoseconds after the first frame, or None where the source has no clock; pixels [H W C])"""


def load_video(
    source: Any,
    channels: int = 3,
    max_side: int | None = None,
    max_rate_hz: float | None = None,
    limits: Limits = DEFAULT,
) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [N H W channels] and int64 [N] ns after the first frame (None where the source has no clock).

    `max_side` shrinks frames, `max_rate_hz` drops frames of files that follow a kept one too closely.
    """
    name = source_name(source)
    with border(source, REPAIR):
        frames: list[np.ndarray] = []
        times: list[int | None] = []
        used, last = 0, None
        gap = 0 if max_rate_hz is None else int(1e9 / max_rate_hz * 0.999)
        for at, pixels in _frames(source, limits, name):
            if at is not None and last is not None and at - last < gap:
                continue
            limits.check_image(pixels.shape[1], pixels.shape[0], name)
            pixels = fit_within(to_channels(pixels, channels), max_side)
            used += pixels.shape[0] * pixels.shape[1]
            if len(frames) == limits.video_frames or used > limits.video_pixels:
                raise MediaError(
                    f"{name} has more than {limits.video_frames} frames or {limits.video_pixels} pixels in all; "
                    "cut it, or set max_rate_hz or max_side"
                )
            if frames and pixels.shape != frames[0].shape:
                raise MediaError(
                    f"{name} frame {len(frames)} is {pixels.shape}, frame 0 is {frames[0].shape}; make them one size"
                )
            frames.append(pixels)
            times.append(at)
            last = at
        if not frames:
            raise MediaError(f"{name} holds no frame; {REPAIR}")
        clock = None if times[0] is None else np.maximum.accumulate(np.array(times, np.int64))
        return np.stack(frames), clock


def _frames(source: Any, limits: Limits, name: str) -> Iterator[Frame]:
    if isinstance(source, str | Path) and Path(source).is_dir():
        files = sorted((f for f in Path(source).iterdir() if f.suffix.lower() in SUFFIXES), key=_natural)
        return ((None, load_image(f, 3, limits)) for f in files)
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        return decode(read_bytes(source, limits, name), limits, name)
    if isinstance(source, list | tuple):
        return ((None, to_channels(load_image(f, 3, limits), 3)) for f in source)
    return _array_frames(source, name)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """frame2 before frame10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name)]


def _array_frames(source: Any, name: str) -> Iterator[Frame]:
    array = source.detach().cpu().numpy() if hasattr(source, "detach") else np.asarray(source)
    if array.ndim not in (3, 4) or array.dtype.kind not in "buif" or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise MediaError(f"{name} has shape {array.shape} and dtype {array.dtype}; give numbers [N H W] or [N H W C], C 1 or 3")
    array = array[..., None] if array.ndim == 3 else array
    return ((None, scale_pixels(frame, f"{name} frame {i}")) for i, frame in enumerate(array))


@cache
def has_torchcodec() -> bool:
    """Whether torchcodec imports and finds a system FFmpeg."""
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder  # noqa: F401

        return torchcodec.ffmpeg_major_version is not None
    except Exception:
        return False


def decode(data: bytes, limits: Limits, name: str, decoder: str = "auto") -> Iterator[Frame]:
    """Frames of a file with torchcodec or PyAV, stopped after `video_seconds` of wall time."""
    if data[4:8] != b"ftyp":  # FFmpeg would guess, and a playlist makes it open other files and addresses
        raise MediaError(f"{name} is not MP4; {REPAIR}")
    end = time.monotonic() + limits.video_seconds
    use = ("torchcodec" if has_torchcodec() else "pyav") if decoder == "auto" else decoder
    for frame in _torchcodec(data, limits, name) if use == "torchcodec" else _pyav(data, limits, name):
        if time.monotonic() > end:
            raise MediaError(f"{name} took longer than {limits.video_seconds:g} s to decode; cut it or lower its resolution")
        yield frame


def _pyav(data: bytes, limits: Limits, name: str) -> Iterator[Frame]:
    import av

    first = None
    with av.open(io.BytesIO(data), mode="r", format="mp4", metadata_errors="ignore") as container:
        if not container.streams.video:
            raise MediaError(f"{name} has no video stream; {REPAIR}")
        stream = container.streams.video[0]
        limits.check_image(stream.codec_context.width, stream.codec_context.height, name)
        for i, frame in enumerate(container.decode(stream)):
            limits.check_image(frame.width, frame.height, name)
            if frame.pts is None or frame.time_base is None:
                raise MediaError(f"{name} frame {i} has no time; {REPAIR}")
            at = int(frame.pts * frame.time_base * 1_000_000_000)
            first = at if first is None else first
            upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # a phone held upright
            yield at - first, np.ascontiguousarray(upright, np.float32) / 255


def _torchcodec(data: bytes, limits: Limits, name: str) -> Iterator[Frame]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, seek_mode="exact", num_ffmpeg_threads=1)
    limits.check_image(decoder.metadata.width or 0, decoder.metadata.height or 0, name)
    first = None
    for i in range(len(decoder)):
        frame = decoder.get_frame_at(i)
        at = round(frame.pts_seconds * 1_000_000_000)
        first = at if first is None else first
        yield at - first, frame.data.permute(1, 2, 0).numpy().astype(np.float32) / 255
