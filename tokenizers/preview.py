"""Media as something a page can show: data URIs for pictures, films and sound, points for curves.

In: a segment. Out: a JSON-ready dict with a `kind` (text, image, video, audio, curves, note). Nothing is written to disk.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from weft.tokenizers.clock import ClockError, segment_times
from weft.tokenizers.media.audio import load_audio
from weft.tokenizers.media.image import load_image, resize, to_channels
from weft.tokenizers.media.video import load_video
from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Text, Video

SIDE = 512
"""Longest side of a shown picture, pixels."""
FRAMES = 90
POINTS = 400
"""Most points of a curve."""
SHOWN_HZ = 16_000


def preview(segment: Segment) -> dict[str, Any]:
    """What the page shows of a segment; a segment that cannot be shown says why."""
    try:
        if isinstance(segment, Text):
            return {"kind": "text", "text": segment.text}
        if isinstance(segment, Image):
            return {"kind": "image", **_picture(load_image(segment.pixels))}
        if isinstance(segment, Video):
            return _film(segment)
        if isinstance(segment, Audio):
            return _sound(segment)
        if isinstance(segment, (Sensor, Action)):
            return _curves(segment)
    except (ValueError, OSError) as error:
        return {"kind": "note", "text": str(error)}
    return {"kind": "note", "text": f"no preview for {segment.modality}"}


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _pixels(pixels: np.ndarray) -> Any:
    """float [H W C] in [0, 1] as a PIL image, small ones enlarged without blur."""
    import PIL.Image

    pixels = to_channels(np.asarray(pixels, np.float32), 3)
    height, width = pixels.shape[:2]
    if max(height, width) > SIDE:
        share = SIDE / max(height, width)
        pixels = resize(pixels, max(1, round(height * share)), max(1, round(width * share)))
    return PIL.Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _picture(pixels: np.ndarray) -> dict[str, Any]:
    out = io.BytesIO()
    picture = _pixels(pixels)
    picture.save(out, "PNG")
    return {"src": _uri("image/png", out.getvalue()), "width": picture.width, "height": picture.height}


def _film(segment: Video) -> dict[str, Any]:
    own_clock = segment.rate_hz is None and segment.times is None
    frames, times = load_video(segment.frames)
    if not own_clock or times is None:
        times = segment_times(segment, len(frames))
    step = -(-len(frames) // FRAMES)
    frames, times = frames[::step], np.asarray(times)[::step]
    gaps = np.diff(times) // 1_000_000
    last = int(np.median(gaps)) if len(gaps) else 500
    pictures = [_pixels(frame) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(
        out, "WEBP", save_all=True, append_images=pictures[1:], duration=[*map(int, gaps), last], loop=0, quality=80, method=2
    )
    size = {"width": pictures[0].width, "height": pictures[0].height}
    return {"kind": "video", "src": _uri("image/webp", out.getvalue()), "frames": len(frames), **size}


def _sound(segment: Audio) -> dict[str, Any]:
    import soundfile

    samples = load_audio(segment.samples, segment.rate_hz, SHOWN_HZ)
    out = io.BytesIO()
    soundfile.write(out, samples, SHOWN_HZ, format="WAV", subtype="PCM_16")
    step = max(1, -(-len(samples) // POINTS))
    padded = np.pad(samples, (0, -len(samples) % step)).reshape(-1, step)
    peaks = np.abs(padded).max(axis=1).round(3).tolist() if len(samples) else []
    return {"kind": "audio", "src": _uri("audio/wav", out.getvalue()), "peaks": peaks, "seconds": len(samples) / SHOWN_HZ}


def _curves(segment: Sensor | Action) -> dict[str, Any]:
    values = np.asarray(segment.values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    try:
        times = segment_times(segment, len(values)) / 1e9
    except ClockError:
        times = np.arange(len(values), dtype=np.float64)
    step = max(1, -(-len(values) // POINTS))
    shown = values[::step]
    names = getattr(segment, "channels", None) or [
        f"{'dim' if segment.modality == 'action' else 'ch'} {c}" for c in range(values.shape[1])
    ]
    return {
        "kind": "curves",
        "x": times[::step].round(6).tolist(),
        "y": [[None if not np.isfinite(v) else round(float(v), 6) for v in shown[:, c]] for c in range(shown.shape[1])],
        "names": list(names),
        "units": list(getattr(segment, "units", None) or []),
        "steps": isinstance(segment, Action) and segment.space.n is not None,
        "count": len(values),
    }
