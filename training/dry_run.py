"""What a run will need, from two of its own steps: build everything, compute, save nothing.

In: a run's config. Out: lines for a person: model, data, memory planned and measured, disk, speed, time and cost.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weft.model.count import active_params, num_params
from weft.training.batches import LOST
from weft.training.build import build
from weft.training.config import RunConfig
from weft.training.loop import Loop
from weft.training.parts import Moment, Parts
from weft.training.plan import GIB, step_bytes

STEPS = 2


def dry_run(config: RunConfig, *, gpu_hour: float | None = None, **given: Any) -> str:
    """Take two steps on real data in a scratch folder and say what the whole run needs; the run's own folder is not touched.

    gpu_hour: price of one GPU (on a CPU: one process) for an hour.
    """
    seen: list[tuple[float, Moment]] = []
    with tempfile.TemporaryDirectory(prefix="weft-dry-") as scratch:
        quiet = replace(config.tracking, trackers=(), panel="none", plots=False)
        rarely = replace(config.checkpoint, every=STEPS + 1)
        short = config.changed(folder=Path(scratch), max_steps=STEPS, max_seconds=None, tracking=quiet, checkpoint=rarely)
        parts = build(short, callbacks=[lambda moment: seen.append((time.monotonic(), moment))], **given)
        began = time.monotonic()
        loop = Loop(parts)
        loop.run(keep=False)
    times = [began, *(when for when, _ in seen)]
    step_s, tokens = times[-1] - times[-2], loop.state.progress.tokens / STEPS
    lines = [_model(parts, seen[-1][1]), _data(config, loop), *_memory(config, parts), _disk(config, parts)]
    lines += [f"speed: {step_s:.3f} s per step, {tokens / step_s:,.0f} tokens/s (the second step, not warm)"]
    return "\n".join([*lines, *_whole(config, parts, step_s, tokens, gpu_hour)])


def _model(parts: Parts, last: Moment) -> str:
    sizes, figures = parts.engine.model.config, last.metrics
    each = ", ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in figures.items() if k.startswith("loss/"))
    weights = f"{num_params(sizes):,} weights, {active_params(sizes):,} of them active per token"
    return f"model: {weights}; loss {figures['loss']:.3f} after {STEPS} steps ({each})"


def _data(config: RunConfig, loop: Loop) -> str:
    tokens, lost = loop.state.progress.tokens / STEPS, loop.state.progress.lost
    told = "; of its documents " + ", ".join(f"{lost[name]:,} {name}" for name in LOST) if lost else ""
    return f"data: {tokens:,.0f} tokens per step ({config.data.batch_tokens:,} asked for){told}"


def _memory(config: RunConfig, parts: Parts) -> list[str]:
    world, device = parts.engine.world, parts.engine.device
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    sizes = step_bytes(
        parts.engine.model.config, config.data.micro_tokens, stage, world.size, config.engine.precision,
        config.engine.recompute, config.engine.expert_parallel,
    )  # fmt: skip
    names = ("weights", "gradients", "moments", "activations")
    planned = " + ".join(f"{name} {size / GIB:.3f}" for name, size in zip(names, sizes))
    if device.type == "cuda":
        found = f"{torch.cuda.max_memory_allocated(device) / GIB:.3f} GiB of the GPU at most"
    else:
        found = (
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.3f} GiB of the process at most, libraries included"
        )
    return [f"memory per rank: {sum(sizes) / GIB:.3f} GiB = {planned}", f"measured: {found}"]


def _disk(config: RunConfig, parts: Parts) -> str:
    engine, place = parts.engine, config.folder.absolute()
    tensors = [*engine.weights().values(), *engine.moments().values()]
    one = sum(t.numel() * t.element_size() for t in tensors) + (
        4 * num_params(engine.model.config) if config.checkpoint.ema else 0
    )
    most = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    short = "" if most * one < free else "; NOT ENOUGH: choose another folder or lower checkpoint.keep_last"
    return f"disk: {one / GIB:.3f} GiB per checkpoint, at most {most} at a time; {free / GIB:,.1f} GiB free at {place}{short}"


def _whole(config: RunConfig, parts: Parts, step_s: float, tokens: float, gpu_hour: float | None) -> list[str]:
    """Length, time and price of the run that the config asks for."""
    steps, seconds = config.max_steps, config.max_seconds
    if seconds is not None and (steps is None or seconds < steps * step_s):
        steps = int(seconds / step_s)
    assert steps is not None
    hours = steps * step_s / 3600
    ranks, unit = parts.engine.world.size, "GPU" if parts.engine.device.type == "cuda" else "process"
    spent = hours * ranks
    price = f", {spent * gpu_hour:,.2f} at {gpu_hour:g} each" if gpu_hour is not None else "; --gpu-hour PRICE gives the cost"
    lines = [f"whole run: {steps:,} steps, {steps * tokens / 1e6:,.2f} M tokens, about {hours:.2f} h on {ranks} {unit}(s)"]
    return [*lines, f"cost: {spent:,.2f} {unit} hours{price}"]
