"""Image sources -> float32 pixels [H W C] in [0, 1].

In: path or bytes (PNG, JPEG, WebP), PIL image, array [H W] or [H W C] or torch [C H W]; uint8 and uint16 over their range,
float in [0, 1]. Files are turned upright by their EXIF tag, transparent pixels lie on white, CMYK becomes RGB, of an
animation the first frame is read.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.media.errors import MediaError, border, source_name
from weft.tokenizers.media.limits import DEFAULT, Limits, read_bytes

FORMATS = ("PNG", "JPEG", "WEBP")
REPAIR = "save it again as PNG, JPEG or WebP"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's convert("L")


def load_image(source: Any, channels: int = 3, limits: Limits = DEFAULT) -> np.ndarray:
    """float32 [H W channels] in [0, 1]; channels is 1 (grey) or 3 (RGB). Raises `MediaError`."""
    import PIL.Image

    name = source_name(source)
    with border(source, REPAIR):
        if isinstance(source, str | Path | bytes | bytearray | memoryview):
            pixels = _decode(read_bytes(source, limits, name), limits, name)
        elif isinstance(source, PIL.Image.Image):
            limits.check_image(*source.size, name)
            pixels = _from_pil(source)
        else:
            pixels = from_array(source, name)
            limits.check_image(pixels.shape[1], pixels.shape[0], name)
        return to_channels(pixels, channels)


def _decode(data: bytes, limits: Limits, name: str) -> np.ndarray:
    """Decode with Pillow: three formats only, size checked before pixels, warnings are errors."""
    import PIL.Image

    if size := _webp_canvas(data):  # its decoder takes two canvases before Pillow knows the size
        limits.check_image(*size, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning)  # broken EXIF and the like: the pixels decide
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            limits.check_image(*image.size, name)
            image.load()
            return _from_pil(image)


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that an extended WebP header states."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return None
    return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1


def _from_pil(image: Any) -> np.ndarray:
    """float32 [H W C], upright, C in 1 or 3, transparency on white."""
    import PIL.ImageOps

    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float32)
        return np.clip(values if image.mode == "F" else values / 65535, 0, 1)[..., None]
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    if image.mode in ("L", "1"):
        return (np.asarray(image.convert("L"), np.float32) / 255)[..., None]
    return np.asarray(image.convert("RGB"), np.float32) / 255


def from_array(source: Any, name: str) -> np.ndarray:
    """float32 [H W C] of an array [H W], [H W C] or a torch tensor [C H W], in [0, 1]."""
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = (source.permute(1, 2, 0) if source.ndim == 3 else source).numpy()
    array = np.asarray(source)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise MediaError(f"{name} has shape {array.shape} and dtype {array.dtype}; give numbers [H W] or [H W C]")
    pixels = scale_pixels(array[..., None] if array.ndim == 2 else array, name)
    if pixels.shape[2] in (2, 4):  # grey or RGB with alpha
        return pixels[..., :-1] * pixels[..., -1:] + (1 - pixels[..., -1:])
    return pixels


def scale_pixels(array: np.ndarray, name: str) -> np.ndarray:
    """float32 in [0, 1] from bool, uint8, uint16 or float 0..1."""
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype.kind in "ui":
        top = 65535 if array.dtype == np.uint16 else 255
        if array.size and (array.min() < 0 or array.max() > top):
            raise MediaError(f"{name} has values {array.min()}..{array.max()}; integers go from 0 to {top}, or use uint16")
        return array.astype(np.float32) / np.float32(top)
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
        raise MediaError(f"{name} has float values {low:.4g}..{high:.4g}; floats go from 0 to 1, use uint8 for 0..255")
    return np.clip(array.astype(np.float32), 0, 1)


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """float32 [... C] with 1 or 3 channels -> `channels` channels."""
    have = pixels.shape[-1]
    if have == channels:
        return np.ascontiguousarray(pixels)
    if have == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    if have == 3 and channels == 1:
        return (pixels @ _LUMA)[..., None]
    raise MediaError(f"an image of {have} channels cannot become {channels}; give 1 (grey), 3 (RGB) or 4 (RGBA) channels")


def fit_within(pixels: np.ndarray, max_side: int | None) -> np.ndarray:
    """Resize [H W C] down, keeping the aspect, so that no side exceeds `max_side` (antialiased bilinear)."""
    height, width = pixels.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return pixels
    share = max_side / max(height, width)
    return resize(pixels, max(1, round(height * share)), max(1, round(width * share)))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [H W C] -> [height width C], antialiased bilinear."""
    import torch
    from torch.nn.functional import interpolate

    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        y = interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return np.ascontiguousarray(y[0].permute(1, 2, 0).clamp(0, 1).numpy())
