"""What ranks run with divided experts (see `scenarios.py`)."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.training import runs, scenarios
from tests.training.scenarios import LOSS, PAIRS, STAGES, deepspeed, keep, pairs_steps, take
from tests.training.synthetic import small_model
from weft.model.transformer import Transformer
from weft.training import distributed
from weft.training.engine import Engine, EngineConfig, LocalEngine

SIZES = {"experts": 4, "experts_per_token": 2, "layers": 3}
ENGINES = ("local", *STAGES)
POISON = ("feature", "gradient", "experts")


def routed_model(favour: tuple[int, ...] = ()) -> Transformer:
    """Four experts in two layers; a selection bias leads all tokens to the `favour`ed ones and leaves the rest without any."""
    model = small_model(**SIZES)
    for moe in model.routers():
        moe.bias[list(favour)] += 10.0
    return model


def engine(name: str, accumulate: int = 1, clip: float = 0.0, model: Transformer | None = None, **more: Any) -> Engine:
    """`local` or `z0` to `z3`, experts divided by two."""
    model, kind = model or routed_model(), more.pop("kind", "adamw")
    if name == "local":
        chosen = replace(scenarios.optimizer(clip), kind=kind)
        return LocalEngine(model, EngineConfig(expert_parallel=2, **more), chosen, LOSS)
    return deepspeed(int(name[1]), accumulate, clip, model, kind, expert_parallel=2, **more)


def quick(out: Path) -> dict[str, Any]:
    """Every engine: unlike modalities and an empty rank, clipping over accumulated steps, poison, exact state."""
    me = distributed.start()
    result: dict[str, Any] = {}
    for name in ENGINES:
        began = time.monotonic()
        one = engine(name)
        result[f"{name}.pairs"] = take(one, pairs_steps(PAIRS, me.rank))
        keep(out, f"{name}.pairs", one)
        one.check_weights()
        result[f"{name}.clip"] = scenarios.clipped(out, name, partial(engine, name, accumulate=2, clip=0.5), me.rank, POISON)
        result[f"{name}.seconds"] = time.monotonic() - began
    one = engine("local", recompute=True)
    result["recompute.pairs"] = take(one, pairs_steps(PAIRS, me.rank))
    keep(out, "recompute.pairs", one)
    for favour in ((0, 1), (2, 3), (0, 3)):
        one = engine("z1", model=routed_model(favour))
        take(one, pairs_steps(PAIRS[:1], me.rank))
        keep(out, "idle." + "".join(map(str, favour)), one)
    result["probe"] = probed(engine("z2"))
    return {**result, **loops(out)}


def probed(one: Engine) -> list[bool]:
    """Whether rank 0 gets a whole model for probes, and others none."""
    with one.gathered() as model:
        mine = [model is not None and model.get_parameter("blocks.1.mlp.experts.down_proj").size(0) == SIZES["experts"]]
    return mine


def loops(out: Path) -> dict[str, Any]:
    """Whole runs: divided experts begin one run, and continue one that a single process began."""
    found: dict[str, Any] = {}
    for name, given, steps in (
        ("divided_then_one", {"kind": "deepspeed", "zero_stage": 2, "bucket": 20000}, 6),
        ("one_then_divided", {"kind": "local"}, 12),
    ):
        engine = {**given, "expert_parallel": 2}
        schedule = {"kind": "constant", "warmup_steps": 0}
        base = runs.config(out / name, schedule=schedule, engine=engine, max_steps=steps)
        found[name] = runs.go(base, model=routed_model()).steps
    return found


def matrix(out: Path) -> dict[str, Any]:
    """`scenarios.matrix` for every engine with divided experts."""
    return scenarios.matrix(out, engine, ENGINES)


def four(out: Path) -> dict[str, Any]:
    """Four ranks: two groups of two, so that every expert lives twice."""
    me = distributed.start()
    result = {}
    for name in ENGINES:
        one = engine(name, clip=0.5)
        result[name] = take(one, [[step[0]] for step in pairs_of_four(me.rank)])
        keep(out, name, one)
        one.check_weights()
    return result


def pairs_of_four(rank: int | None) -> list[list[Any]]:
    """Two steps in which four ranks hold four kinds of documents, one of them none."""
    found = []
    for i, kinds in enumerate((("image", "audio", "none", "text"), ("action", "text", "sensor", "video"))):
        docs = [scenarios.documents(kind, 4 * i + r) for r, kind in enumerate(kinds)]
        everyone = [document for mine in docs for document in mine]
        found.append([scenarios.one(everyone, rows=4)] if rank is None else [scenarios.one(docs[rank])])
    return found


def variants(out: Path) -> dict[str, Any]:
    """Choices that meet divided experts: bf16, Muon, CPU offload, compiled blocks."""
    me = distributed.start()
    result: dict[str, Any] = {}
    for name, kind, more in (
        ("bf16", "z1", {"precision": "bf16"}),
        ("muon_local", "local", {"kind": "muon"}),
        ("muon_z0", "z0", {"kind": "muon"}),
        ("offload2", "z2", {"offload": True}),
        ("offload3", "z3", {"offload": True}),
        ("compile_local", "local", {"compile": True}),
        ("compile_z1", "z1", {"compile": True}),
    ):
        one = engine(kind, **more)
        result[name] = take(one, pairs_steps(PAIRS, me.rank))
        keep(out, name, one)
        torch.compiler.reset()
    return result
