"""A checkpoint is whole, or it is not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.training import checkpoint
from weft.training.checkpoint import (
    CheckpointError,
    DiskFullError,
    checkpoints,
    newest_valid,
    prune,
    publish,
    recover,
    step_folder,
    verify,
    write_json,
)


def write(value: float, score: float | None = None):
    def into(folder: Path) -> None:
        save_file({"w": torch.full((7, 3), value)}, folder / "model.safetensors")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "text.model").write_bytes(bytes(range(50)))
        write_json(folder / "trainer.json", {"score": score})

    return into


def test_published_folder_verifies_and_lists_every_file(tmp_path):
    folder = publish(step_folder(tmp_path, 3), write(1.0))
    verify(folder)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {"manifest.json", "model.safetensors", "tokenizer/text.model", "trainer.json"}


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path):
    publish(step_folder(tmp_path, 1), write(1.0))
    folder = publish(step_folder(tmp_path, 2), write(2.0))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        places = range(0, len(whole), 5) if path.name != "manifest.json" else ()
        for at in places:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CheckpointError):
                verify(folder)
        for size in range(0, len(whole) - 2, 29):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError):
                verify(folder)
        path.write_bytes(whole)
    verify(folder)


@pytest.mark.parametrize("harm", ["missing", "extra", "link", "swapped"])
def test_missing_extra_linked_and_swapped_files_are_refused(tmp_path, harm):
    old = publish(step_folder(tmp_path, 1), write(1.0))
    folder = publish(step_folder(tmp_path, 2), write(2.0))
    target = folder / "model.safetensors"
    if harm == "missing":
        target.unlink()
    elif harm == "extra":
        (folder / "more.bin").write_bytes(b"x")
    elif harm == "link":
        target.unlink()
        target.symlink_to(old / "model.safetensors")
    else:
        target.write_bytes((old / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors|more\.bin"):
        verify(folder)
    assert newest_valid(tmp_path) == old


class Crash(BaseException):
    """The process is gone."""


def test_crash_at_any_system_call_leaves_the_old_or_the_new_one(tmp_path, monkeypatch):
    """Stop the save at its n-th fsync, rename or open, for every n; what is left must be valid after recovery."""
    names = ("fsync", "rename", "replace")
    real = {name: getattr(os, name) for name in names}
    states = 0
    for stop in range(200):
        root = tmp_path / str(stop)
        old = publish(step_folder(root, 1), write(1.0))
        publish(step_folder(root, 2), write(2.0))
        calls = 0

        def counted(name, stop=stop):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > stop:
                    raise Crash
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, counted(name))
            patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a dead process cleans nothing
            try:
                publish(step_folder(root, 2), write(3.0))
                finished = True
            except Crash:
                finished = False
        recover(root)
        found = newest_valid(root)
        assert found == step_folder(root, 2), f"stopped after {stop} calls"
        verify(old)
        assert not [p for p in root.iterdir() if p.name.startswith(".")]
        states += 1
        if finished:
            break
    assert finished
    assert states > 8


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_a_full_or_failing_disk_never_costs_the_last_good_one(tmp_path, monkeypatch, code):
    good = publish(step_folder(tmp_path, 1), write(1.0))
    real, calls = os.fsync, 0

    def fail(descriptor):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(code, os.strerror(code))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    with pytest.raises(DiskFullError if full else OSError, match=r"no room for checkpoint .*step-00000002" if full else None):
        publish(step_folder(tmp_path, 2), write(2.0))
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    verify(good)


def test_a_disk_known_to_be_too_small_is_refused_before_writing(tmp_path):
    with pytest.raises(DiskFullError, match="MiB needed"):
        publish(step_folder(tmp_path, 1), write(1.0), needed_bytes=2**60)
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step, score in enumerate([3.0, 1.0, 2.0, None, 5.0], start=1):
        publish(step_folder(tmp_path, step), write(step, score))
    prune(tmp_path, keep_last=2, keep_best=2)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "3", "4", "5"]
    prune(tmp_path, keep_last=1, keep_best=1)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "5"]


def test_a_refused_checkpoint_of_a_later_step_does_not_cost_the_one_just_written(tmp_path):
    for step in (6, 8, 9):
        publish(step_folder(tmp_path, step), write(step, None))
    (step_folder(tmp_path, 9) / "trainer.json").write_text("{}")  # refused, so the run went on from 6 and has just saved 8
    prune(tmp_path, keep_last=1, newest=step_folder(tmp_path, 8))
    assert newest_valid(tmp_path) == step_folder(tmp_path, 8)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["8", "9"]


def test_hostile_manifest_cannot_reach_outside(tmp_path):
    folder = publish(step_folder(tmp_path, 1), write(1.0))
    (tmp_path / "secret").write_text("x")
    write_json(
        folder / "manifest.json", {"files": {"../secret": {"bytes": 1, "sha256": checkpoint.sha256(tmp_path / "secret")}}}
    )
    with pytest.raises(CheckpointError):
        verify(folder)
    (folder / "manifest.json").write_text("[" * 100000)
    with pytest.raises(CheckpointError, match="cannot read"):
        verify(folder)
