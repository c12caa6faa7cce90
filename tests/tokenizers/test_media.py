"""Media loaders: every legal odd case works, everything else is a MediaError, quickly and in bounded memory."""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
import wave
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from weft.tokenizers.media.audio import load_audio, resample
from weft.tokenizers.media.errors import MediaError
from weft.tokenizers.media.image import fit_within, load_image
from weft.tokenizers.media.limits import Limits
from weft.tokenizers.media.video import decode, has_torchcodec, load_video

sys.path.insert(0, str(Path(__file__).parent))
import media_samples as samples


def read(fmt: str, data: bytes) -> object:
    """Load bytes as the format's medium."""
    if fmt == "mp4":
        return load_video(data)
    return load_image(data) if fmt in ("png", "jpeg", "webp") else load_audio(data, None, 8000)


# ---- images


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (13, 1), (7, 5)])
@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
def test_every_size_of_image_is_read_in_its_own_shape(fmt: str, size: tuple[int, int]) -> None:
    pixels = load_image(samples.image_bytes(fmt, samples.picture(*size)))
    assert pixels.shape == (*size, 3) and pixels.dtype == np.float32
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_png_pixels_are_exact() -> None:
    array = samples.picture()
    assert np.array_equal(load_image(samples.image_bytes("png", array)), array.astype(np.float32) / 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pil_mode_gives_the_channels_asked_for(mode: str, channels: int) -> None:
    image = PIL.Image.new(mode, (5, 3))
    assert load_image(image, channels).shape == (3, 5, channels)


def test_grey_is_repeated_and_rgb_is_weighed() -> None:
    grey = samples.picture(3, 5, 1)
    assert np.array_equal(load_image(grey, 3), np.repeat(grey.astype(np.float32) / 255, 3, axis=2))
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    assert np.allclose(load_image(red, 1), 0.299)


def test_transparent_pixels_lie_on_white() -> None:
    array = np.zeros((2, 3, 4), np.uint8)
    array[0, :, 3] = 255
    expect = np.concatenate([np.zeros((1, 3, 3)), np.ones((1, 3, 3))])
    assert np.allclose(load_image(samples.image_bytes("png", array)), expect)
    assert np.allclose(load_image(array), expect)
    palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=1)
    assert np.allclose(load_image(out.getvalue())[0, 1], 1)


def test_cmyk_jpeg_is_read_as_rgb() -> None:
    out = io.BytesIO()
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(out, "JPEG", quality=95)
    assert np.allclose(load_image(out.getvalue()), [1, 0, 0], atol=0.05)


def test_16_bit_png_keeps_its_range() -> None:
    array = np.array([[0, 32768, 65535]], np.uint16)
    assert np.allclose(load_image(samples.image_bytes("png", array), 1)[0, :, 0], [0, 0.5, 1], atol=1e-4)
    assert np.allclose(load_image(array, 1)[0, :, 0], [0, 0.5, 1], atol=1e-4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    """The stored pixels are what the tag describes; the loaded ones are upright."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # bright corner top left
    undo = {2: "hflip", 3: "180", 4: "vflip", 5: "transpose", 6: "rot90", 7: "transverse", 8: "rot270"}.get(orientation)
    stored = {
        None: upright,
        "hflip": upright[:, ::-1],
        "180": upright[::-1, ::-1],
        "vflip": upright[::-1],
        "transpose": upright.transpose(1, 0, 2),
        "rot90": np.rot90(upright, 1),
        "transverse": np.rot90(upright[:, ::-1], -1).copy()[::1],
        "rot270": np.rot90(upright, -1),
    }[undo]
    if undo == "transverse":
        stored = upright[::-1, ::-1].transpose(1, 0, 2)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    pixels = load_image(samples.image_bytes("png", np.ascontiguousarray(stored), exif=exif))
    assert pixels.shape == (16, 32, 3)
    assert np.array_equal(pixels, upright.astype(np.float32) / 255)


def test_paths_torch_numpy_and_pil_agree(tmp_path: Path) -> None:
    array = samples.picture()
    path = tmp_path / "a.png"
    path.write_bytes(samples.image_bytes("png", array))
    expect = load_image(array)
    for source in (path, str(path), PIL.Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1), expect):
        assert np.array_equal(load_image(source), expect)


def test_large_images_shrink_with_their_aspect() -> None:
    assert fit_within(np.ones((40, 100, 3), np.float32), 50).shape == (20, 50, 3)
    assert fit_within(np.ones((1, 100, 3), np.float32), 10).shape == (1, 10, 3)
    assert fit_within(np.ones((4, 10, 3), np.float32), 50).shape == (4, 10, 3)


@pytest.mark.parametrize(
    ("source", "needle"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(40), "PNG, JPEG or WebP"),
        ("/no/such/file.png", "/no/such/file.png does not exist"),
        (np.full((2, 2), np.nan), "float values"),
        (np.full((2, 2), 255.0), "use uint8"),
        (np.zeros((2, 2, 7), np.uint8), "7"),
        (np.array([["a"]]), "dtype"),
        (object(), "object"),
        (np.zeros((9000, 1), np.uint8), "9000"),
    ],
)
def test_bad_images_are_named_and_told_what_to_do(source: object, needle: str) -> None:
    with pytest.raises(MediaError, match=needle):
        load_image(source)


def test_an_image_bomb_is_refused_before_its_pixels_are_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for width, height in ((20000, 20000), (8193, 1), (5000, 4000), (2**31 - 1, 2**31 - 1)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = zlib.compress(bytes(1 << 20))
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        begin = time.process_time()
        with pytest.raises(MediaError):
            load_image(bomb)
        assert time.process_time() - begin < 0.5
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xfe\x3f\x00" * 2
    with pytest.raises(MediaError, match="16383x16383"):
        load_image(webp)


# ---- sound


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("fmt", ["wav", "flac", "ogg"])
def test_sound_of_1_to_8_channels_becomes_mono(fmt: str, channels: int) -> None:
    sound = load_audio(samples.audio_bytes(fmt, samples.tone(channels=channels)), None, 8000)
    assert sound.shape == (2000,) and sound.dtype == np.float32
    assert abs(np.abs(sound).max() - 0.4) < 0.05


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_wav_coding_is_read(subtype: str) -> None:
    sound = load_audio(samples.audio_bytes("wav", subtype=subtype), None, 8000)
    assert np.abs(sound - samples.tone()[:, 0]).max() < 0.05


@pytest.mark.parametrize("rate_hz", [8000, 11025, 12347, 22050, 44100, 48000, 96000, 192000, 22050.5])
def test_any_rate_keeps_pitch_length_and_loudness(rate_hz: float) -> None:
    sound = np.sin(2 * np.pi * 440 * np.arange(int(rate_hz)) / rate_hz).astype(np.float32)
    out = resample(sound, rate_hz, 16000)
    assert abs(len(out) - 16000) <= 2
    assert abs(np.abs(np.fft.rfft(out)).argmax() - 440) <= 1
    assert abs(out.std() - 0.7071) < 0.01


def test_integer_and_float_samples_agree() -> None:
    sound = samples.tone()[:, 0]
    unsigned = ((sound * 127 + 128).astype(np.uint8), (sound * 32767 + 32768).astype(np.uint16))
    for array in ((sound * 32767).astype(np.int16), *unsigned, torch.from_numpy(sound)):
        assert np.abs(load_audio(array, 8000, 8000) - sound).max() < 0.02


def test_a_wav_header_that_lies_about_its_length_is_not_trusted() -> None:
    data = bytearray(samples.audio_bytes("wav"))
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFF0)
    assert len(load_audio(bytes(data), None, 8000)) == 2000


def test_long_sound_is_refused_while_it_is_decoded() -> None:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes(8000 * 3))
    with pytest.raises(MediaError, match="longer than 2 s"):
        load_audio(out.getvalue(), None, 8000, Limits(audio_seconds=2))


@pytest.mark.parametrize(
    ("source", "rate_hz", "needle"),
    [
        (b"not a sound", None, "WAV, FLAC or OGG"),
        (np.zeros(9, np.float32), None, "rate_hz"),
        (np.zeros(9, np.float32), -1, "rate_hz"),
        (np.full(9, np.nan, np.float32), 8000, "NaN"),
        (np.zeros((9, 9), np.float32), 8000, "9 channels"),
        (np.zeros((2, 2, 2)), 8000, "shape"),
        (np.zeros(700, np.float32), 1, "at most 600 s"),
    ],
)
def test_bad_sounds_are_told_what_to_do(source: object, rate_hz: float | None, needle: str) -> None:
    with pytest.raises(MediaError, match=needle):
        load_audio(source, rate_hz, 16000)


def test_a_sound_file_of_another_format_or_rate_is_refused() -> None:
    with pytest.raises(MediaError, match="AIFF"):
        load_audio(samples.audio_bytes("aiff"), None, 8000)
    with pytest.raises(MediaError, match="4000 Hz"):
        load_audio(samples.audio_bytes("wav", rate_hz=4000), None, 8000)
    with pytest.raises(MediaError, match="leave rate_hz out"):
        load_audio(samples.audio_bytes("wav"), 16000, 8000)


# ---- video


def test_variable_frame_times_come_from_the_file() -> None:
    frames, clock = load_video(samples.video_bytes(4, times_ms=[0, 40, 200, 1000]))
    assert frames.shape == (4, 32, 48, 3)
    assert clock is not None and clock.tolist() == [0, 40_000_000, 200_000_000, 1_000_000_000]


@pytest.mark.skipif(not has_torchcodec(), reason="needs torchcodec and a system FFmpeg (pip install 'weft[video]')")
def test_both_decoders_give_the_same_frames_and_times() -> None:
    data = samples.video_bytes(4, times_ms=[0, 40, 200, 1000], turn=90)
    one, two = (list(decode(data, Limits(), "video", decoder)) for decoder in ("pyav", "torchcodec"))
    assert [t for t, _ in one] == [t for t, _ in two]
    assert all(np.allclose(a, b, atol=2 / 255) for (_, a), (_, b) in zip(one, two))


def test_frames_of_a_file_look_like_what_was_written() -> None:
    frames, _ = load_video(samples.video_bytes(3))
    for i, frame in enumerate(frames):
        assert np.abs(frame - samples.picture(32, 48, 3, seed=i) / 255).mean() < 0.06


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_frames_of_a_turned_camera_are_upright(turn: int) -> None:
    frames, _ = load_video(samples.video_bytes(2, turn=turn))
    for i, frame in enumerate(frames):
        assert np.abs(frame - np.rot90(samples.picture(32, 48, 3, seed=i), turn // 90) / 255).mean() < 0.06


def test_a_frame_rate_cap_drops_frames_and_a_side_cap_shrinks_them() -> None:
    frames, clock = load_video(samples.video_bytes(9), max_rate_hz=5, max_side=24)
    assert frames.shape == (5, 16, 24, 3)
    assert clock is not None and clock.tolist() == [i * 200_000_000 for i in range(5)]


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        (tmp_path / f"frame{i}.png").write_bytes(samples.image_bytes("png", np.full((2, 3, 3), i, np.uint8)))
    (tmp_path / "notes.txt").write_text("no frame")
    frames, clock = load_video(tmp_path)
    assert clock is None
    assert np.rint(frames[:, 0, 0, 0] * 255).tolist() == [1, 2, 10]


def test_arrays_lists_and_tensors_of_frames_agree() -> None:
    array = np.stack([samples.picture(seed=i) for i in range(3)])
    expect = array.astype(np.float32) / 255
    for source in (array, torch.from_numpy(array), list(array), expect):
        assert np.array_equal(load_video(source)[0], expect)
    assert load_video(array[..., 0], channels=1)[0].shape == (3, 11, 17, 1)


def test_bad_videos_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="holds no frame"):
        load_video(tmp_path)
    with pytest.raises(MediaError, match="more than 3 frames"):
        load_video(samples.video_bytes(5), limits=Limits(video_frames=3))
    with pytest.raises(MediaError, match="pixels in all"):
        load_video(samples.video_bytes(5), limits=Limits(video_pixels=32 * 48 * 2))
    with pytest.raises(MediaError, match="frame 1 is"):
        load_video([samples.picture(3, 5), samples.picture(5, 3)])
    with pytest.raises(MediaError, match="MP4"):
        load_video(b"#EXTM3U\nhttp://127.0.0.1/x.ts\n")
    with pytest.raises(MediaError, match="shape"):
        load_video(np.zeros((2, 2), np.uint8))


# ---- damage


def attack(fmt: str, count: int) -> None:
    """Only MediaError, no read over 2 s of processor time, memory bounded."""
    data, random = samples.sample(fmt), np.random.default_rng(20260101)
    read(fmt, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for i in range(count):
        damaged = samples.mutate(data, random)
        begin = time.process_time()
        try:
            read(fmt, damaged)
        except MediaError as error:
            assert str(error)
            refused += 1
        assert time.process_time() - begin < 2, f"{fmt} mutation {i} took over 2 s"
    assert refused > count // 10, "the mutator does no damage"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


@pytest.mark.parametrize("fmt", samples.FORMATS)
def test_2000_damaged_files_raise_only_media_errors(fmt: str) -> None:
    attack(fmt, 2000)
