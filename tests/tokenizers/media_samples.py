"""Small media made on the spot, and mutators that damage them the way disks, networks and attackers do."""

from __future__ import annotations

import io
import struct

import numpy as np

FORMATS = ("png", "jpeg", "webp", "wav", "flac", "ogg", "mp4")


def picture(height: int = 11, width: int = 17, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [H W C]: a smooth gradient with some noise."""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    noise = np.random.default_rng(seed).integers(0, 20, (height, width, channels))
    return ((y * 9 + x * 5 + c * 50) % 230 + noise).astype(np.uint8)


def image_bytes(fmt: str, array: np.ndarray | None = None, **options: object) -> bytes:
    """An encoded image."""
    import PIL.Image

    array = picture() if array is None else array
    out = io.BytesIO()
    PIL.Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(out, fmt, **options)
    return out.getvalue()


def tone(seconds: float = 0.25, rate_hz: int = 8000, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    """float32 [N channels]: a sine."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.repeat((0.4 * np.sin(2 * np.pi * hz * t)).astype(np.float32)[:, None], channels, axis=1)


def audio_bytes(fmt: str, samples: np.ndarray | None = None, rate_hz: int = 8000, subtype: str | None = None) -> bytes:
    """An encoded sound."""
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, tone() if samples is None else samples, rate_hz, format=fmt.upper(), subtype=subtype)
    return out.getvalue()


def video_bytes(
    frames: int = 7, height: int = 32, width: int = 48, times_ms: list[int] | None = None, turn: float = 0.0
) -> bytes:
    """An MP4 at 10 frames per second, or with the given frame times; `turn`: degrees counterclockwise that a player adds."""
    from fractions import Fraction

    import av

    out = io.BytesIO()
    with av.open(out, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(height, width, 3, seed=i), format="rgb24")
            frame.pts, frame.time_base = times_ms[i] if times_ms else i * 100, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def sample(fmt: str) -> bytes:
    """A small valid file of a format."""
    if fmt == "mp4":
        return video_bytes()
    return image_bytes(fmt) if fmt in ("png", "jpeg", "webp") else audio_bytes(fmt)


_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """One to three damages: flipped bytes, huge or zero lengths, cuts, repeats, foreign pieces. PNG checksums are repaired."""
    out = bytearray(data)
    for _ in range(random.integers(1, 4)):
        kind, at = random.integers(7), int(random.integers(max(len(out), 1)))
        if kind <= 1 and out:  # flip bytes, headers more often than bodies
            for _ in range(random.integers(1, 9)):
                where = int(random.integers(min(len(out), 64) if random.random() < 0.5 else len(out)))
                out[where] = int(random.integers(256))
        elif kind == 2 and len(out) > 8:  # write an interesting number over four bytes
            where = int(random.integers(min(len(out) - 4, 96) if random.random() < 0.7 else len(out) - 4))
            struct.pack_into(random.choice(["<I", ">I"]), out, where, int(random.choice(_NUMBERS)))
        elif kind == 3:  # cut the end off
            del out[at:]
        elif kind == 4:  # take a piece out
            del out[at : at + int(random.integers(1, 65))]
        elif kind == 5:  # repeat a piece
            out[at:at] = out[at : at + int(random.integers(1, 257))]
        else:  # splice noise in
            out[at:at] = random.bytes(int(random.integers(1, 33)))
    return _repair_png(bytes(out)) if data[:4] == b"\x89PNG" and random.random() < 0.7 else bytes(out)


def _repair_png(data: bytes) -> bytes:
    """Right checksums for every chunk, so that damage reaches the decoder behind them."""
    import zlib

    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        size = struct.unpack_from(">I", out, at)[0]
        if at + 12 + size > len(out):
            break
        struct.pack_into(">I", out, at + 8 + size, zlib.crc32(out[at + 4 : at + 8 + size]))
        at += 12 + size
    return bytes(out)
