"""Checkpoints: a directory made complete, then published by one rename.

    .step-7.tmp-PID/  files -> fsync each -> manifest.json (size, SHA-256 of every file) -> fsync -> fsync folder
    rename to step-00000007/ -> fsync parent

A crash at any moment leaves the old checkpoints untouched and at most a `.tmp-` folder, which the next start removes. Loading
reads every byte against the manifest first, because safetensors does not notice a flipped payload bit. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("weft.training")
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, incomplete or altered."""


class DiskFullError(OSError):
    """Not enough room for a checkpoint; nothing that existed before was touched."""


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name, or None if it is no checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def publish(folder: Path, write: Callable[[Path], None], needed_bytes: int = 0) -> Path:
    """Run `write(temporary folder)`, seal the result with a manifest and rename it to `folder`.

    An older folder of the same name is replaced; it is deleted only after the new one is in place. Raises `DiskFullError`
    (and removes the temporary folder) if the disk has no room.
    """
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise _full(folder, needed_bytes, free)
    draft = parent / f".{folder.name}.tmp-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        write(draft)
        _seal(draft)
        _swap(draft, folder)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder, needed_bytes, shutil.disk_usage(parent).free) from error
        raise
    return folder


def _full(folder: Path, needed: int, free: int) -> DiskFullError:
    text = (
        f"no room for checkpoint {folder}: about {needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free; "
        "free some space or lower checkpoint.keep_last (earlier checkpoints are untouched)"
    )
    return DiskFullError(errno.ENOSPC, text)


def _seal(draft: Path) -> None:
    entries = {}
    folders = {draft}
    for path in sorted(draft.rglob("*")):
        if path.is_dir():
            folders.add(path)
            continue
        entries[path.relative_to(draft).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path, sync=True)}
    write_json(draft / MANIFEST, {"format": 1, "files": entries})
    for path in folders:
        sync_folder(path)


def _swap(draft: Path, folder: Path) -> None:
    old = folder.parent / f".{folder.name}.old"
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(draft, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync`, the file is also flushed to the disk."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write JSON and flush it to the disk. Not finite numbers are refused: JSON has no word for them."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read JSON, or `CheckpointError` naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); use another checkpoint") from error


def replace_file(path: Path, text: str) -> None:
    """Write a small file completely or not at all."""
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path) -> None:
    """Hold every byte of `folder` against its manifest; raises `CheckpointError` naming the first fault."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint folder; point to a folder that holds {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files; use another checkpoint")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()} - {MANIFEST}
    for name in sorted(found ^ set(files)):
        state = "is not in the manifest" if name in found else "is missing"
        raise CheckpointError(f"{folder}: {name} {state}; use another checkpoint")
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is not a plain file; use another checkpoint")
        if path.stat().st_size != entry.get("bytes") or sha256(path) != entry.get("sha256"):
            raise CheckpointError(
                f"{folder}: {name} was altered or cut (its SHA-256 differs from the manifest); use another checkpoint"
            )


def checkpoints(root: Path) -> list[Path]:
    """All published checkpoint folders, oldest first (not verified)."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and step_of(p) is not None), key=lambda p: step_of(p) or 0)


def newest_valid(root: Path) -> Path | None:
    """The newest checkpoint whose every byte agrees with its manifest. Each refused one is named in the log."""
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            log.warning("checkpoint refused: %s", error)
    return None


def recover(root: Path) -> None:
    """Remove drafts that a crash left behind; put back a folder whose replacement was never published."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if re.fullmatch(r"\..+\.tmp-\d+", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif re.fullmatch(r"\..+\.old", path.name) and path.is_dir():
            final = root / path.name[1:].removesuffix(".old")
            if final.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, final)


def prune(root: Path, keep_last: int, keep_best: int = 0, newest: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep_last` and the `keep_best` with the lowest evaluation score; returns what went.

    The score is `trainer.json`'s `score`; a checkpoint without one is never among the best. newest: the checkpoint just
    written; later steps were refused when the run was continued, so they neither count nor cost one that is good.
    """
    folders = [f for f in checkpoints(root) if newest is None or (step_of(f) or 0) <= (step_of(newest) or 0)]
    keep = set(folders[len(folders) - max(1, keep_last) :])
    scored = []
    for folder in folders:
        try:
            score = read_json(folder / "trainer.json").get("score")
        except CheckpointError:
            continue
        if isinstance(score, int | float):
            scored.append((score, -(step_of(folder) or 0), folder))
    keep.update(folder for _, _, folder in sorted(scored)[:keep_best])
    gone = [folder for folder in folders if folder not in keep]
    for folder in gone:
        hidden = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
        os.rename(folder, hidden)  # first out of sight, so that a crash half-way never leaves a folder that looks whole
        shutil.rmtree(hidden)
    return gone
