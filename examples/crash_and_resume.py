"""A run that is shot three times and ends as if nothing had happened: media -> shards -> train -> kill -> resume -> compare.

    python examples/crash_and_resume.py crash            # under two minutes on two idle cores

The media are files: 8 x 8 scans of handwriting and parts of two photos (both from scikit-learn), words spoken by espeak-ng,
films and readings of a simulated pendulum. Two runs of the same YAML follow: `whole` is left alone, `shot` gets SIGKILL,
SIGKILL and SIGTERM at arbitrary moments and is started again each time. Then every byte that matters is compared, and the
plots of the run and a page about its data lie in the folder. Needs 'weft[world]'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import demo_document
import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TILE = 64  # pixels of a part of a photo
RUN = """\
folder: {root}/whole
max_steps: {steps}
model:
  preset: tiny
  sizes: {{width: 96, layers: 3, heads: 4, kv_heads: 2, head_width: 24, expert_width: 96, shared_width: 96, dense_width: 192}}
data:
  sources:
    - {{path: {root}/shards}}
  validation:
    - {{path: {root}/shards, split: val}}
  tokenizer: {root}/tokenizer
  plan: dense
  batch_tokens: 2048
  micro_batches: 2
  length: 1024
  dropout: {{image: 0.1}}
loss: {{mean_over: tokens}}
optimizer: {{lr: 2.0e-3}}
schedule: {{kind: wsd, warmup_steps: 5}}
evaluation: {{every: 20, batches: 2}}
checkpoint: {{every: 10, ema: 0.99}}
monitors: {{router_every: 10, probe_every: 20}}
tracking: {{panel: none}}
"""


def scans(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures of handwritten digits and the word for each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = []
    for i, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True))):
        if i == count:
            break
        grey = np.round(pixels.reshape(8, 8) * 255 / 16).astype(np.uint8)
        Image.fromarray(grey).resize((16, 16), Image.Resampling.NEAREST).convert("RGB").save(folder / f"scan{i:04d}.png")
        segments = [{"image": f"scan{i:04d}.png"}, {"text": WORDS[label], "role": "target"}]
        found.append({"id": f"scan-{i}", "source": "scans", "segments": segments})
    return found


def photos(folder: Path) -> list[dict[str, Any]]:
    """Parts of the two photos that come with scikit-learn, each with the name of its photo."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    found = []
    for name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
        for y in range(0, pixels.shape[0] - TILE, 2 * TILE):
            for x in range(0, pixels.shape[1] - TILE, 2 * TILE):
                path = f"{name}-{y:03d}-{x:03d}.jpg"
                Image.fromarray(pixels[y : y + TILE, x : x + TILE]).resize((32, 32)).save(folder / path)
                segments = [{"image": path, "role": "observed"}, {"text": f"part of {name}.jpg", "role": "target"}]
                found.append({"id": path.removesuffix(".jpg"), "source": "photos", "segments": segments})
    return found


def words(folder: Path, count: int) -> list[dict[str, Any]]:
    """Spoken digits and the word for each."""
    from weft.benchmarks.world.speech import STUDIO, Clip, record

    clips = [Clip(f"word{i:03d}.flac", STUDIO[i % len(STUDIO)], WORDS[i % 10], 150 + 5 * (i % 9), 50) for i in range(count)]
    record(clips, folder)
    return [
        {"id": c.path, "source": "speech", "segments": [{"audio": c.path}, {"text": c.text, "role": "target"}]} for c in clips
    ]


def write_media(folder: Path) -> Path:
    """All media and their manifest; every tenth document is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = scans(folder, 400) + photos(folder) + words(folder, 80) + demo_document.episodes(folder, 24, seconds=1.0)
    for i, document in enumerate(documents):
        document["split"] = "val" if i % 10 == 9 else "train"
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    return path


def make_data(root: Path) -> None:
    """Media, shards, tokenizer and the page about the data; what is there already is kept."""
    from weft.commands import data

    manifest = root / "media" / "manifest.jsonl"
    data.prepare(str(manifest if manifest.exists() else write_media(root / "media")), str(root / "shards"))
    if not (root / "tokenizer").exists():
        data.fit_tokenizer(
            str(root / "shards"), str(root / "tokenizer"), sample=400, chunk_s=0.1, text_size=300, patch=8, steps=60
        )
    data.report(str(root / "shards"), str(root / "data.html"), tokenizer=str(root / "tokenizer"))


def start(root: Path, name: str) -> subprocess.Popen[bytes]:
    """Begin or continue a run in a process of its own."""
    command = [sys.executable, "-m", "weft.training.train", str(root / "run.yaml"), f"folder={root / name}"]
    with open(root / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def saved(folder: Path) -> list[str]:
    """Names of a run's checkpoints."""
    return sorted(p.name for p in (folder / "checkpoints").glob("step-*"))


def shoot(root: Path, name: str, seed: int) -> list[str]:
    """SIGKILL, SIGKILL, SIGTERM, each some time after the run has got on; what happened, in words."""
    draw, told = random.Random(seed), []
    for shot in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        before = saved(root / name)
        process = start(root, name)
        while process.poll() is None and saved(root / name) == before:  # until it has got on, by one checkpoint at least
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 2.0))
        process.send_signal(shot)
        status, found = process.wait(), saved(root / name)
        told.append(f"{shot.name}: exit status {status}, newest checkpoint {found[-1] if found else 'none'}")
    if start(root, name).wait():
        raise SystemExit(f"the resumed run failed; see {root / name}.log")
    return told


def digest(path: Path) -> str:
    """SHA-256, shortened for a table."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compare(root: Path, steps: int) -> tuple[list[str], bool]:
    """A table of digests, and whether all are equal."""
    last = f"checkpoints/step-{steps:08d}"
    names = ["metrics.jsonl", "final/model.safetensors"]
    names += [f"{last}/{part}.safetensors" for part in ("model", "optimizer", "ema")]
    lines, same = [f"{'':<46} {'whole':<16} {'shot':<16}"], True
    for name in names:
        one, other = (digest(root / run / name) for run in ("whole", "shot"))
        same &= one == other
        lines.append(f"{name:<46} {one} {other} {'equal' if one == other else 'DIFFERENT'}")
    return lines, same


def main(root: Path, steps: int, seed: int) -> int:
    """Everything, told as it happens; 1 if the runs differ."""
    began = time.monotonic()
    make_data(root)
    (root / "run.yaml").write_text(RUN.format(root=root, steps=steps), encoding="utf-8")
    print(f"[{time.monotonic() - began:5.1f} s] the whole run, {steps} steps", flush=True)
    if start(root, "whole").wait():
        print(f"the run failed; see {root / 'whole'}.log", file=sys.stderr)
        return 1
    print(f"[{time.monotonic() - began:5.1f} s] the same run, shot", flush=True)
    for line in shoot(root, "shot", seed):
        print("    " + line)
    lines, same = compare(root, steps)
    print(f"[{time.monotonic() - began:5.1f} s] compared")
    print("\n".join(lines))
    summary = json.loads((root / "shot" / "summary.json").read_text())
    print(f"summary: {json.dumps({k: summary[k] for k in ('steps', 'applied', 'skipped', 'tokens', 'data')})}")
    print(f"plots: {', '.join(sorted(p.name for p in (root / 'shot' / 'plots').iterdir()))}; the data: {root / 'data.html'}")
    return 0 if same else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Shoot a run three times and compare it with one that was left alone.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(main(given.folder, given.steps, given.seed))
