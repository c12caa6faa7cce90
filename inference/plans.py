"""From what the caller asks for to what can be written: every size resolved from the call, the prompt and the tokenizers.

In: a `Produce` and what the document holds so far (`SegmentInfo`s). Out: a `Plan`. What this model cannot produce, or cannot
know the size of, is refused here with the option that repairs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from weft.inference.errors import ProduceError
from weft.inference.request import LIMIT, Produce
from weft.inference.values import is_integer
from weft.inference.writer import Plan
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.clock import to_ns
from weft.tokenizers.grammar import Want
from weft.tokenizers.stream import SegmentInfo

Info = Sequence[SegmentInfo]


def plan_of(item: Produce, tokenizer: StreamTokenizer, info: Info) -> Plan:
    """The plan of one segment after the segments `info`."""
    owner = tokenizer.tokenizers.get(item.modality)
    if owner is None:
        have = ", ".join(tokenizer.tokenizers)
        raise ProduceError(f"this model has no {item.modality} tokenizer (it has {have}); produce one of these")
    if owner.size == 0:
        raise ProduceError(
            f"this model reads {item.modality} but cannot produce it: no codec is fitted; fit one and train with it"
        )
    return _PLANS[item.modality](item, owner, tokenizer, media(info))


def producible(tokenizer: StreamTokenizer, info: Info, most: int) -> dict[str, Plan]:
    """Plans for `produce="any"`: everything that this model can produce without being told more."""
    plans = {}
    for name in ("text", "image", "audio", "sensor"):
        if getattr(tokenizer.tokenizers.get(name), "size", 0):
            try:
                plans[name] = plan_of(Produce(name, max_tokens=most), tokenizer, info)
            except ProduceError:
                continue
    return plans


def _text(item: Produce, owner: Any, tokenizer: StreamTokenizer, info: Info) -> Plan:
    return Plan(want=Want.text(item.most, item.least))


def _image(item: Produce, owner: Any, tokenizer: StreamTokenizer, info: Info) -> Plan:
    kept = None
    grid = item.grid
    if item.edit is not None:
        tokens = owner.encode(item.edit)
        if grid is not None and tuple(grid) != tuple(tokens.grid):
            raise ProduceError(f"grid={tuple(grid)} differs from the edited image's {tuple(tokens.grid)}; drop grid=")
        grid, kept = tokens.grid, np.where(_kept(item.keep, tokens.grid), tokens.codes, -1)
    if grid is None and (last := _last(info, "image")) is not None:
        grid = last.grid
    return Plan(want=Want("image", shape=_fitting(grid, item, tokenizer), max_tokens=_bound(grid, item)), kept=kept)


def _video(item: Produce, owner: Any, tokenizer: StreamTokenizer, info: Info) -> Plan:
    last = _last(info, "video")
    grid = item.grid if item.grid is not None else last.grid if last else None
    rate = item.rate_hz or (last.fields.get("rate_hz") if last else None)
    if rate is None:
        raise ProduceError("produce='video' needs rate_hz= (frames a second), as no video in the prompt says it")
    want = Want("video", shape=_fitting(grid, item, tokenizer), max_tokens=_bound(grid, item))
    return Plan(want=want, rate_hz=rate, start=_start(item, last, rate), fields={"rate_hz": rate})


def _audio(item: Produce, owner: Any, tokenizer: StreamTokenizer, info: Info) -> Plan:
    least, most, kept = item.least, item.most, None
    if item.edit is not None:
        tokens = owner.encode(item.edit)
        count = _count(item.keep, len(tokens), "sound tokens")
        kept = tokens.codes[:count]
        least = most = len(tokens)
    if item.seconds is not None:
        wanted = item.seconds * owner.config.sample_rate_hz / owner.config.token_samples
        _within(wanted, f"seconds={item.seconds}")
        least = most = max(int(np.ceil(wanted - 1e-9)), 1)
    if kept is not None and len(kept) > most:
        raise ProduceError(f"keep= holds {len(kept)} sound tokens, but seconds= allows {most}; keep less or ask for more")
    return Plan(want=Want.audio(least, most), kept=kept)


def _sensor(item: Produce, owner: Any, tokenizer: StreamTokenizer, info: Info) -> Plan:
    last = _last(info, "sensor", kind=item.kind)
    kind = item.kind or (last.fields.get("kind") if last else None)
    if kind is None and len(owner.kinds) == 1:
        kind = next(iter(owner.kinds))
    if kind not in owner.kinds:
        known = ", ".join(sorted(owner.kinds)) or "none"
        raise ProduceError(f"produce='sensor' needs kind= (one of {known}), got {kind!r}")
    channels = len(owner.kinds[kind].scalings)
    if item.channels not in (None, channels):
        raise ProduceError(f"channels={item.channels}, but sensors of kind {kind!r} have {channels}; drop channels=")
    rate = item.rate_hz or (last.fields.get("rate_hz") if last else None)
    if rate is None and item.readings != 1:
        raise ProduceError("produce='sensor' needs rate_hz= (readings a second), as no such sensor in the prompt says it")
    _within((item.readings or 1) * channels, f"readings={item.readings}")
    want = Want.sensor(channels, item.readings)
    if item.readings is None:
        most = max(item.most, channels)
        want = Want("sensor", (channels,), channels, most // channels * channels)
    known_kind = owner.kinds[kind]
    fields = {"kind": kind, "rate_hz": rate, "channels": known_kind.channels, "units": known_kind.units}
    return Plan(want=want, start=_start(item, last, rate), rate_hz=rate, fields=fields)


def _action(item: Produce, owner: Any, tokenizer: StreamTokenizer, info: Info) -> Plan:
    space, steps = item.action_space, item.readings or 1
    sizes = {name: end - first for name, (first, end) in tokenizer.vocabulary.spans.items()}
    if space.n is not None and space.n > sizes["discrete"]:
        raise ProduceError(f"the space has {space.n} choices, this model knows {sizes['discrete']}; use a smaller space")
    chunked = space.n is None and owner.config.continuous == "chunks"
    if space.n is None and not chunked and not sizes["bins"]:
        raise ProduceError(
            "the space is continuous, but this model has no action bins; use a discrete space or train with bins"
        )
    if space.dims >= tokenizer.vocabulary.numbers:
        raise ProduceError(f"the space has {space.dims} dimensions, this model can state {tokenizer.vocabulary.numbers - 1}")
    _within(steps * space.dims, f"readings={item.readings}")
    last = _last(info, "action")
    rate = item.rate_hz or (last.fields.get("rate_hz") if last else None)
    if rate is None and steps > 1:
        raise ProduceError("several actions need rate_hz= (actions a second), as no action in the prompt says it")
    want = Want.action(space, steps)
    if chunked:
        most = owner.chunks.steps * space.dims * -(-steps // owner.chunks.steps)
        want = Want("action", (space.dims,), 1, most, "chunks")
    start = _start(item, last, rate)
    if item.start is None:  # an action follows what it was chosen by
        start = max((t for t in (start, latest(info)) if t is not None), default=None)
    return Plan(want=want, start=start, rate_hz=rate, fields={"space": space, "rate_hz": rate})


_PLANS = {"text": _text, "image": _image, "video": _video, "audio": _audio, "sensor": _sensor, "action": _action}


def media(info: Info) -> list[SegmentInfo]:
    """The segments as they are; those read through a resampler have fewer positions and other shapes."""
    return [i.medium or i for i in info]


def _last(info: Info, modality: str, kind: str | None = None) -> SegmentInfo | None:
    """The last segment of a modality (and sensor kind) in the document."""
    mine = [i for i in info if i.modality == modality and kind in (None, i.fields.get("kind"))]
    return mine[-1] if mine else None


def latest(info: Info) -> int | None:
    """ns of the latest token with a clock; of what the model has produced only the beginning, as the rest may lie ahead."""
    ends = (i.start + (0 if i.target or not len(i.times) else int(i.times[-1])) for i in media(info) if i.start is not None)
    return max(ends, default=None)


def _start(item: Produce, last: SegmentInfo | None, rate: float | None) -> int | None:
    """When the new segment begins: as stated, or one step after the last such segment, if that has a clock."""
    if item.start is not None:
        return to_ns(item.start, f"start of the produced {item.modality}")
    if last is None or last.start is None:
        return None
    if len(last.times):
        step = int(last.times[-1] - last.times[-2]) if len(last.times) > 1 else round(1e9 / rate) if rate else 0
        return last.start + int(last.times[-1]) + step
    steps = last.grid[0]
    return last.start + round(steps * 1e9 / rate) if rate else last.start


def _fitting(grid: tuple[int, ...] | None, item: Produce, tokenizer: StreamTokenizer) -> tuple[int, ...] | None:
    """A stated grid, if its numbers exist and it stays within a stated limit."""
    if grid is None:
        return None
    if max(grid) >= tokenizer.vocabulary.numbers:
        raise ProduceError(
            f"grid={grid} exceeds the {tokenizer.vocabulary.numbers - 1} patches a side that this model can state"
        )
    _within(int(np.prod(grid)), f"grid={grid}")
    if item.max_tokens is not None and int(np.prod(grid)) > item.max_tokens:
        raise ProduceError(
            f"grid={grid} needs {int(np.prod(grid))} tokens, max_tokens={item.max_tokens}; raise it or shrink the grid"
        )
    return grid


def _within(tokens: float, what: str) -> None:
    """Refuse a body that no call can mean, before memory is asked for it."""
    if tokens > LIMIT:
        raise ProduceError(f"{what} needs {tokens:.0f} tokens, a segment has {LIMIT} at most; ask for less at once")


def _bound(grid: tuple[int, ...] | None, item: Produce) -> int:
    return item.most if grid is None else max(int(np.prod(grid)), 1)


def _kept(keep: Any, grid: tuple[int, ...]) -> np.ndarray:
    """bool [h * w]: which patches stay."""
    mask = np.asarray(keep)
    if mask.ndim == 2:
        if mask.dtype != bool or mask.shape != tuple(grid):
            raise ProduceError(f"keep= is a mask of {mask.dtype} {mask.shape}; it must be bool {tuple(grid)}, one per patch")
        return mask.reshape(-1)
    rows = _count(keep, grid[0], "patch rows")
    return np.arange(grid[0] * grid[1]) < rows * grid[1]


def _count(keep: Any, total: int, what: str) -> int:
    """How many of `total` units stay: a fraction (float) or a number (int)."""
    if isinstance(keep, float | np.floating) and 0 <= keep <= 1:
        return round(float(keep) * total)
    if is_integer(keep) and 0 <= keep <= total:
        return int(keep)
    raise ProduceError(f"keep={keep!r} must be a fraction from 0.0 to 1.0 or a number of {what} from 0 to {total}")
