"""Write one document with every modality: a photo, a film, speech, a 100 Hz and a 3 Hz sensor, and actions.

    python examples/demo_document.py demo
    weft inspect demo/demo.json --out demo/page.html --chunk-s 0.25

Out, in the folder: `photo.png frames/ speech.flac imu.npy demo.json`, and `episodes.jsonl`: the same thing many times over, for
`weft prepare demo/episodes.jsonl --out demo/shards`. The film, both sensors and the actions are one simulated pendulum with a
motor; the photo comes with scikit-learn (flower.jpg, by dany13, CC BY 2.0); the voice is espeak-ng's. Needs 'weft[world]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

IMU_HZ, FRAME_HZ, MOTOR_HZ, HEAT_HZ = 100, 10, 10, 3
SIDE = 48  # pixels of a frame
BOUND = 2.0  # Nm, either way


def swing(seconds: float, seed: int) -> dict[str, np.ndarray]:
    """A pendulum of 1 m and 1 kg: torques [N], (angle, rate) [N 2] at 100 Hz, and the motor's heat [N]."""
    rng = np.random.default_rng(seed)
    steps = round(seconds * IMU_HZ)
    torque = np.repeat(np.clip(rng.normal(0, 1, -(-steps * MOTOR_HZ // IMU_HZ)), -BOUND, BOUND), IMU_HZ // MOTOR_HZ)[:steps]
    angle, rate, heat = rng.uniform(0.5, 1.2), 0.0, 20.0
    states, heats = [], []
    for push in torque:
        rate += (-9.81 * np.sin(angle) - 0.15 * rate + push) / IMU_HZ
        angle += rate / IMU_HZ
        heat += (0.8 * push**2 - 0.05 * (heat - 20.0)) / IMU_HZ
        states.append((angle, rate))
        heats.append(heat)
    return {"torque": torque, "state": np.array(states), "heat": np.array(heats)}


def draw(angle: float) -> Any:
    """One frame: the rod and the weight."""
    from PIL import Image, ImageDraw

    frame = Image.new("RGB", (SIDE, SIDE), (16, 20, 28))
    pen = ImageDraw.Draw(frame)
    top, length = (SIDE / 2, SIDE / 4), SIDE * 0.38
    end = (top[0] + length * np.sin(angle), top[1] + length * np.cos(angle))
    pen.line([top, end], fill=(200, 205, 215), width=2)
    pen.ellipse([end[0] - 5, end[1] - 5, end[0] + 5, end[1] + 5], fill=(235, 130, 40))
    return frame


def segments(folder: Path, name: str, motion: dict[str, np.ndarray], start_s: float) -> list[dict[str, Any]]:
    """The clocked segments of one episode; media are written below `folder / name`."""
    frames = folder / name / "frames"
    frames.mkdir(parents=True, exist_ok=True)
    state = motion["state"]
    for i, angle in enumerate(state[:: IMU_HZ // FRAME_HZ, 0]):
        draw(angle).save(frames / f"{i:03d}.png")
    np.save(folder / name / "imu.npy", state.astype(np.float32))
    thin = np.arange(0, len(state), IMU_HZ / HEAT_HZ).astype(int)
    torque = motion["torque"][:: IMU_HZ // MOTOR_HZ].round(4)
    path = (Path(name) / "frames").as_posix(), (Path(name) / "imu.npy").as_posix()
    return [
        {"video": path[0], "rate_hz": FRAME_HZ, "start_s": start_s, "name": "camera"},
        {
            "sensor": path[1], "rate_hz": IMU_HZ, "start_s": start_s, "name": "imu", "kind": "imu",
            "channels": ["angle", "rate"], "units": ["rad", "rad/s"],
        },
        {
            "sensor": motion["heat"][thin].round(3).tolist(), "rate_hz": HEAT_HZ, "start_s": start_s, "name": "motor heat",
            "kind": "heat", "channels": ["temperature"], "units": ["deg C"],
        },
        {
            "action": [[float(push)] for push in torque], "rate_hz": MOTOR_HZ, "start_s": start_s, "name": "motor",
            "space": {"low": [-BOUND], "high": [BOUND]},
        },
    ]  # fmt: skip


def speak(folder: Path, text: str) -> str:
    """The path of a sentence, spoken."""
    from weft.benchmarks.world.speech import Clip, record

    (folder / "speech.flac").unlink(missing_ok=True)
    record([Clip("speech.flac", "en-US+f2", text, 170, 50)], folder)
    return "speech.flac"


def photo(folder: Path) -> str:
    """The path of the photo."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    Image.fromarray(load_sample_image("flower.jpg")).resize((320, 213)).save(folder / "photo.png")
    return "photo.png"


def demo(folder: Path, seconds: float = 3.0) -> dict[str, Any]:
    """The document, as JSON; its media are written."""
    said = "the pendulum swings"
    return {
        "id": "demo",
        "segments": [
            {"text": "A photo from the garden, then three seconds at the bench."},
            {"image": photo(folder), "name": "photo.png"},
            *segments(folder, ".", swing(seconds, 0), 0.0),
            {"audio": speak(folder, said), "start_s": 0.5, "name": "speech"},
            {"text": said, "role": "target"},
        ],
    }


def episodes(folder: Path, count: int, seconds: float = 2.0) -> list[dict[str, Any]]:
    """Short episodes with a question and its answer."""
    found = []
    for i in range(count):
        motion = swing(seconds, i + 1)
        where = "left" if motion["state"][-1, 0] < 0 else "right"
        pieces = segments(folder, f"episodes/{i:03d}", motion, 0.0)
        found.append(
            {
                "id": f"pendulum-{i:03d}",
                "split": "val" if i % 8 == 7 else "train",
                "source": "pendulum",
                "segments": [*pieces, {"text": "Where is it?"}, {"text": where, "role": "target"}],
            }
        )
    return found


def write(folder: Path, count: int = 24) -> Path:
    """Everything into `folder`; returns the path of the document."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(demo(folder), indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(episode) for episode in episodes(folder, count)]
    (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "demo.json"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a document with every modality.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--episodes", type=int, default=24)
    given = parser.parse_args()
    print(write(given.folder, given.episodes))
