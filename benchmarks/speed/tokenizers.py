"""How fast each modality becomes tokens, and tokens become media, on one core.

    python -m weft.benchmarks.speed.tokenizers [--quick] [--json FILE]

Where a library does a comparable step it is the rival: sentencepiece without our check for exactness, torchvision's decoder
with unfold, torchaudio's mel spectrogram module, numpy.digitize. Elsewhere the rate stands alone. More is better everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.codec_fit import CodecFit
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.segment import Action, ActionSpace, Audio, Image, Sensor, Text, Video
from weft.tokenizers.sensor import SensorTokenizer
from weft.tokenizers.text import TextTokenizer
from weft.tokenizers.video import VideoConfig, VideoTokenizer


@dataclass(frozen=True)
class Case:
    """One line: what is done, how much of it a call does, and who does the same."""

    name: str
    unit: str
    amount: float
    """Units per call."""
    ours: Callable[[], object]
    rival: Callable[[], object] | None = None
    tokens: int = 0
    """Tokens per call."""
    note: str = ""


def main() -> None:
    """Measure every modality and print the table."""
    args = speed_parser("tokenizers", __doc__ or "").parse_args()
    args.threads = args.threads or 1
    start(args)
    random = np.random.default_rng(args.seed)
    steps = 20 if args.quick else 200
    rows = []
    for make in (text_cases, image_cases, video_cases, audio_cases, number_cases):
        for case in make(random, steps):
            rows.append(run(case, rounds=5 if args.quick else 25, budget_s=1.5 if args.quick else 15.0))
    finish(rows, args)


def run(case: Case, rounds: int, budget_s: float) -> Row:
    """Median rate of both sides."""
    calls = {"ours": case.ours} | ({"rival": case.rival} if case.rival else {})
    time_s = measure(calls, rounds, budget_s=budget_s)
    rate = {name: case.amount / t for name, t in time_s.items()}
    extra = {"tokens_per_s": case.tokens / time_s["ours"]} if case.tokens else {}
    return compare(case.name, rate["ours"], rate.get("rival"), unit=case.unit, more_is_better=True, note=case.note, extra=extra)


def text_cases(random: np.random.Generator, steps: int) -> list[Case]:
    """Prose of random words."""
    from sentencepiece import SentencePieceProcessor

    words = ["".join(chr(97 + c) for c in random.integers(0, 26, n)) for n in random.integers(2, 10, 2000)]
    prose = " ".join(words[i] for i in random.zipf(1.4, 20_000) % 2000)
    tokenizer = TextTokenizer.fit([prose], 1000)
    plain = SentencePieceProcessor(model_proto=tokenizer.model)
    megabytes = len(prose.encode()) / 1e6
    codes = tokenizer.encode_text(prose)
    listed = codes.tolist()
    segment = Text(prose)
    return [
        Case(
            "text encode",
            "MB/s",
            megabytes,
            lambda: tokenizer.encode(segment),
            lambda: plain.encode(prose),
            len(codes),
            "rival: sentencepiece alone",
        ),
        Case("text decode", "MB/s", megabytes, lambda: tokenizer.decode_text(codes), lambda: plain.decode(listed), len(codes)),
    ]


def image_cases(random: np.random.Generator, steps: int) -> list[Case]:
    """Small scans with a fitted codec, and a photo from its JPEG bytes."""
    import PIL.Image
    from torchvision.io import ImageReadMode, decode_image

    scans = random.random((256, 8, 8), np.float32)
    tokenizer, _ = ImageTokenizer.fit(list(scans), ImageConfig(patch=2, channels=1), fit=CodecFit(steps=steps))
    segments = [Image(s) for s in scans]
    codes = tokenizer.encode(segments[0])
    out = io.BytesIO()
    small = PIL.Image.fromarray(random.integers(0, 256, (14, 14, 3), np.uint8)).resize((448, 448))
    small.save(out, "JPEG")
    photo, config = Image(out.getvalue()), ImageTokenizer(ImageConfig(patch=16))
    coded = torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)

    def torchvision() -> torch.Tensor:
        pixels = decode_image(coded, ImageReadMode.RGB).float() / 255
        return torch.nn.functional.unfold(pixels[None], 16, stride=16)

    return [
        Case("image 8x8 to codes, one by one", "img/s", 256, lambda: [tokenizer.encode(s) for s in segments], tokens=4096),
        Case("image 8x8 to codes, 256 at once", "img/s", 256, lambda: tokenizer.encode_many(segments), tokens=4096),
        Case("image 8x8 from codes", "img/s", 1, lambda: tokenizer.decode(codes.codes, codes.grid), tokens=16),
        Case(
            "photo 448x448 JPEG to patches",
            "img/s",
            1,
            lambda: config.encode(photo),
            torchvision,
            784,
            "rival: torchvision + unfold",
        ),
    ]


def video_cases(random: np.random.Generator, steps: int) -> list[Case]:
    """Frames in memory and an MP4."""
    from fractions import Fraction

    import av

    frames = random.integers(0, 256, (30, 128, 128, 3), np.uint8)
    tokenizer = VideoTokenizer(VideoConfig(patch=16))
    segment = Video(frames, rate_hz=30)
    out = io.BytesIO()
    with av.open(out, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file = Video(out.getvalue())
    return [
        Case("video 128x128 frames to patches", "frame/s", 30, lambda: tokenizer.encode(segment), tokens=1920),
        Case("video 128x128 MP4 to patches", "frame/s", 30, lambda: tokenizer.encode(file), tokens=1920),
    ]


def audio_cases(random: np.random.Generator, steps: int) -> list[Case]:
    """Ten seconds at 16 kHz, once more from 44.1 kHz FLAC, and back."""
    import soundfile
    from torchaudio.transforms import MelSpectrogram

    sound = (random.standard_normal(160_000) * 0.1).astype(np.float32)
    segment = Audio(sound, rate_hz=16_000)
    tokenizer, _ = AudioTokenizer.fit([segment], AudioConfig(), fit=CodecFit(steps=steps))
    mel = MelSpectrogram(16_000, 512, 400, 160, n_mels=80, power=1.0, norm="slaney", mel_scale="slaney")
    samples = torch.from_numpy(sound)
    tokens = tokenizer.encode(segment)
    out = io.BytesIO()
    soundfile.write(out, (random.standard_normal(441_000) * 0.1).astype(np.float32), 44_100, format="FLAC")
    file = Audio(out.getvalue())
    return [
        Case(
            "audio 16 kHz to codes",
            "s/s",
            10,
            lambda: tokenizer.encode(segment),
            lambda: mel(samples).clamp(min=1e-5).log(),
            250,
            "rival: torchaudio log-mel, no codes",
        ),
        Case("audio 44.1 kHz FLAC to codes", "s/s", 10, lambda: tokenizer.encode(file), tokens=250),
        Case("audio from codes (Griffin-Lim)", "s/s", 10, lambda: tokenizer.decode(tokens.codes, tokens.grid), tokens=250),
    ]


def number_cases(random: np.random.Generator, steps: int) -> list[Case]:
    """10 s of a six-channel 100 Hz sensor, seven-dimensional actions as bins and as chunks."""
    values = random.standard_normal((1000, 6))
    sensor = SensorTokenizer().fit("imu", [values])
    reading = Sensor(values, rate_hz=100, kind="imu")
    coded = sensor.encode(reading)
    edges = [np.quantile(values[:, c], np.linspace(0, 1, 1025)[1:-1]) for c in range(6)]
    box = ActionSpace(low=(-1.0,) * 7, high=(1.0,) * 7)
    moves = [
        Action(np.sin(np.linspace(0, random.uniform(1, 9), 50))[:, None] * random.random(7), box, rate_hz=50) for _ in range(20)
    ]
    bins, chunks = ActionTokenizer(ActionConfig(bins=256)), ActionTokenizer.fit(moves)
    short = sum(len(chunks.encode(m)) for m in moves)
    return [
        Case(
            "sensor to codes",
            "value/s",
            6000,
            lambda: sensor.encode(reading),
            lambda: np.stack([np.digitize(values[:, c], edges[c]) for c in range(6)], 1),
            6000,
            "rival: numpy.digitize, codes only",
        ),
        Case("sensor from codes", "value/s", 6000, lambda: sensor.decode(coded.codes, coded.grid), tokens=6000),
        Case("action to bins", "value/s", 7000, lambda: [bins.encode(m) for m in moves], tokens=7000),
        Case(
            "action to chunks",
            "value/s",
            7000,
            lambda: [chunks.encode(m) for m in moves],
            None,
            short,
            f"{7000 / short:.1f}x fewer tokens",
        ),
    ]


if __name__ == "__main__":
    main()
