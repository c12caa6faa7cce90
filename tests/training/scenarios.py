"""What `ranks.launch` runs on every rank.

A scenario writes weights and moments as safetensors and losses as JSON; the test compares them with a plain one-process run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.training import runs
from tests.training.synthetic import FEATURES, small_model, stream
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch, collate
from weft.tokenizers.stream import Stream
from weft.training import distributed
from weft.training.engine import Engine, EngineConfig, LocalEngine
from weft.training.loss import LossConfig
from weft.training.optim import OptimizerConfig

LOSS = LossConfig(contrastive=0.1)
STAGES = ("z0", "z1", "z2", "z3")
PIECES = {
    "none": [],
    "text": [("text", True)],
    "image": [("image", False), ("image", True)],
    "video": [("video", False), ("video", True)],
    "audio": [("audio", False), ("audio", True)],
    "sensor": [("sensor", False), ("sensor", True)],
    "action": [("action", False), ("action", True)],
}
PAIRS = [("image", "audio"), ("text", "sensor"), ("action", "none"), ("video", "text")]
"""What rank 0 and rank 1 see; `none` is a batch of padding."""


def documents(name: str, seed: int) -> list[Stream]:
    """Two documents of one modality with a pair key, or none."""
    return [stream(PIECES[name], 10 * seed + i, pair=str(i)) for i in range(2)] if PIECES[name] else []


def one(streams: list[Stream], rows: int = 1) -> Batch:
    """A batch with these documents in one row."""
    return collate([streams] if streams else [[]], 64 * rows, FEATURES)


def optimizer(clip: float = 0.0) -> OptimizerConfig:
    """AdamW with steps that a test can see."""
    return OptimizerConfig(lr=1e-2, clip=clip)


def take(engine: Engine, steps: list[list[Batch]]) -> list[float]:
    """One update per entry; returns the losses."""
    losses = []
    for mine in steps:
        swap = engine.exchange(list(mine), [0.0])
        outcome = engine.forward_backward(mine, swap.whole)
        assert outcome.finite
        engine.step(1.0)
        engine.model.update_router_bias(outcome.load)
        losses.append(outcome.metrics["loss"])
    return losses


def deepspeed(
    stage: int, accumulate: int = 1, clip: float = 0.0, model: Transformer | None = None, kind: str = "adamw", **more: Any
) -> Engine:
    """A fresh engine over the same weights."""
    from weft.training.deepspeed_engine import DeepSpeedEngine

    config = EngineConfig(kind="deepspeed", zero_stage=stage, bucket=20000, **more)  # type: ignore[arg-type]
    chosen = replace(optimizer(clip), kind=kind)  # type: ignore[arg-type]
    return DeepSpeedEngine(model or small_model(), config, chosen, LOSS, accumulate)


def keep(out: Path, name: str, engine: Engine) -> None:
    """Rank 0 writes the state; every rank gathers it."""
    weights, moments = engine.weights(), engine.moments()
    if engine.world.first:
        save_file({k: v.contiguous() for k, v in weights.items()}, out / f"{name}.weights.safetensors")
        save_file({k: v.contiguous() for k, v in moments.items()}, out / f"{name}.moments.safetensors")


def pairs_steps(pairs: list[tuple[str, str]], rank: int | None) -> list[list[Batch]]:
    """One step per pair: this rank's micro-batch, or (rank None) both ranks' documents in one batch."""
    found = []
    for i, (left, right) in enumerate(pairs):
        both = [documents(left, 2 * i), documents(right, 2 * i + 1)]
        found.append([one(both[0] + both[1], rows=2)] if rank is None else [one(both[rank])])
    return found


def accumulated(rank: int | None, seed: int = 40) -> list[list[Batch]]:
    """Two steps of two micro-batches per rank; contrastive pairs left out, for they depend on the split."""
    found = []
    for step in range(2):
        docs = [[stream(PIECES[n], seed + 10 * step + i)] for i, n in enumerate(("image", "text", "audio", "action"))]
        micro = [one(d) for d in docs]
        found.append(micro if rank is None else micro[2 * rank : 2 * rank + 2])
    return found


def zero(out: Path, stages: list[int]) -> dict[str, Any]:
    """Skewed modalities, accumulation, poison and elastic state for every stage."""
    me = distributed.start()
    result: dict[str, Any] = {}
    for stage in stages:
        began = time.monotonic()
        engine = deepspeed(stage)
        result[f"z{stage}.pairs"] = take(engine, pairs_steps(PAIRS, me.rank))
        keep(out, f"z{stage}.pairs", engine)
        make = partial(deepspeed, stage, accumulate=2, clip=0.5)
        result[f"z{stage}.clip"] = clipped(out, f"z{stage}", make, me.rank, ("feature", "gradient"))
        result[f"z{stage}.seconds"] = time.monotonic() - began
    return result


def clipped(out: Path, name: str, make: Callable[[], Engine], rank: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Two accumulated, clipped steps; poison; then the same steps from the saved state."""
    engine = make()
    losses = take(engine, accumulated(rank))
    keep(out, f"{name}.clip", engine)
    skipped = poison(engine, rank, kinds)
    after = take(engine, accumulated(rank, seed=90))
    again = make()
    distributed.barrier()
    again.load(load_file(out / f"{name}.clip.weights.safetensors"), load_file(out / f"{name}.clip.moments.safetensors"), {})
    repeated = take(again, accumulated(rank, seed=90))
    keep(out, f"{name}.after", engine)
    keep(out, f"{name}.again", again)
    return {"losses": losses, "poison": skipped, "resumed": [after, repeated]}


def poison(engine: Engine, rank: int, kinds: tuple[str, ...]) -> list[bool]:
    """NaN on rank 1 only, in a feature, then in a gradient ...: [first finite?, second finite?, ..., everything as before?]."""
    before = engine.weights(), engine.moments()
    seen = []
    for kind in kinds:
        mine = accumulated(rank)[0]
        hook = None
        if rank == 1 and kind == "feature":
            mine[0].features["audio"].fill_(float("nan"))
        if rank == 1 and kind == "gradient":
            head = engine.model.norm

            def spoil(module: Any, into: Any, out: Any) -> Any:
                return tuple(None if g is None else g * float("nan") for g in into)

            hook = head.register_full_backward_hook(spoil)
        if rank == 1 and kind == "experts":  # the gradient of what rank 1 got back from all experts

            def spoil_rows(module: Any, into: Any, out: Any) -> None:
                out.register_hook(lambda g: g * float("nan"))

            hook = engine.model.routers()[0].experts.register_forward_hook(spoil_rows)
        swap = engine.exchange(list(mine), [0.0])
        seen.append(engine.forward_backward(mine, swap.whole).finite)
        engine.skip()
        if hook is not None:
            hook.remove()
    after = engine.weights(), engine.moments()
    same = all(torch.equal(a[k], b[k]) for a, b in zip(before, after) for k in a)
    return [*seen, same]


def replicated(out: Path) -> dict[str, Any]:
    """The local engine on two ranks."""
    me = distributed.start()
    engine = LocalEngine(small_model(), EngineConfig(), optimizer(), LOSS)
    losses = take(engine, pairs_steps(PAIRS, me.rank))
    keep(out, "local2.pairs", engine)
    return {"local2.pairs": losses}


def loops(out: Path) -> dict[str, Any]:
    """Whole runs: ZeRO-3 begins a run; ZeRO-1 continues one that a single process began."""
    found: dict[str, Any] = {}
    for name, stage, steps in (("two_then_one", 3, 6), ("one_then_two", 1, 12)):
        schedule = {"kind": "constant", "warmup_steps": 0}
        run = runs.config(
            out / name,
            schedule=schedule,
            engine={"kind": "deepspeed", "zero_stage": stage, "bucket": 20000},
            data={"prefetch": 1},
        )
        found[name] = runs.go(replace(run, max_steps=steps)).steps
    return found


def everything(out: Path) -> dict[str, Any]:
    """What the default suite runs in one job."""
    return {**replicated(out), **zero(out, [0, 1, 2, 3]), **loops(out)}


def matrix(
    out: Path, make: Callable[[str], Engine] = lambda name: deepspeed(int(name[1])), names: Sequence[str] = STAGES
) -> dict[str, Any]:
    """Every ordered pair of modalities on the two ranks, one update each from fresh state, for every engine."""
    me = distributed.start()
    for name in names:
        for left in PIECES:
            for right in PIECES:
                engine = make(name)
                take(engine, pairs_steps([(left, right)], me.rank))
                keep(out, f"{name}.{left}.{right}", engine)
    return {}
