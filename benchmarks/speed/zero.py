"""Two processes under every ZeRO stage, with whole and with divided experts, against one process with the same tokens.

In: packed random documents; each of two gloo processes takes one micro-batch of a step, one process takes both. Out: a table.
`ours` is the seconds of one step on two processes, `rival` those of the plain engine in one process; `error` is the largest
relative difference of their losses over all steps. Beside them, per rank: bytes held between steps by every tensor alive, the
growth of the process from before the model was built to its peak, and what `weft plan` says. Two processes on one machine
share its memory bandwidth: the table shows what the stages cost and save, not how they scale.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
import warnings
from typing import Any

import torch

from weft.benchmarks.speed.ranks import on_ranks
from weft.benchmarks.speed.report import Row, compare, finish, speed_parser, start

VOCAB = 3000
RANKS = 2
MIB = 2**20
BUCKET = 2_000_000  # numbers that are reduced at a time; the default of 50 M would outweigh a small model
STAGES = {f"ZeRO-{stage}": {"kind": "deepspeed", "zero_stage": stage, "bucket": BUCKET} for stage in range(4)}
CASES: dict[str, dict[str, Any]] = {
    "plain, replicated": {"kind": "local"},
    "plain, experts / 2": {"kind": "local", "expert_parallel": 2},
    **STAGES,
    **{f"{name}, experts / 2": {**given, "expert_parallel": 2} for name, given in STAGES.items()},
}
QUICK = ("plain, experts / 2", "ZeRO-1", "ZeRO-3")


def sizes(quick: bool) -> Any:
    """The `tiny` preset with four experts, two per token."""
    from weft.model.presets import preset

    layers = {"layers": 3} if quick else {}
    return preset("tiny", vocab_size=VOCAB, slices=((0, VOCAB),), experts=4, experts_per_token=2, **layers)


def batch(tokens: int, seed: int) -> Any:
    """Random documents of 20 to 120 tokens, every token learnt."""
    from weft.tokenizers.pack import Batch

    draw = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(tokens - sum(lengths), int(torch.randint(20, 121, (), generator=draw))))
    ends = torch.tensor(lengths).cumsum(0) - 1
    landmark = torch.zeros(tokens, dtype=torch.bool)
    landmark[ends] = True
    zeros, none = torch.zeros(tokens, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    place = torch.cat([torch.arange(n) for n in lengths]).int()
    return Batch(
        ids=torch.randint(1, VOCAB, (tokens,), generator=draw), modality=zeros, channel=zeros,
        position=place[:, None].expand(-1, 3).contiguous(), landmark=landmark, two_way=zeros.int() - 1, features={},
        document=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int(), feature_at={},
        target=torch.randint(1, VOCAB, (tokens,), generator=draw), target_modality=zeros, target_slice=zeros,
        weight=torch.ones(tokens), embed_at=none, embed_pair=none, rows=1,
    )  # fmt: skip


def build(given: dict[str, Any], quick: bool, seed: int) -> Any:
    """The engine of one case over the same weights."""
    from weft.model.transformer import Transformer
    from weft.training.engine import EngineConfig, LocalEngine
    from weft.training.loss import LossConfig
    from weft.training.optim import OptimizerConfig

    torch.manual_seed(seed)
    model, config = Transformer(sizes(quick)), EngineConfig(device="cpu", **given)
    if config.kind == "local":
        return LocalEngine(model, config, OptimizerConfig(), LossConfig())
    from weft.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, OptimizerConfig(), LossConfig())


def work(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """One rank's steps: losses, seconds of each step after the first, and memory."""
    from weft.training import distributed

    me = distributed.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engine = build(CASES.get(case, {"kind": "local"}), args.quick, args.seed)
    losses, seconds = [], []
    for step in range(args.steps):
        whole = [batch(args.tokens, args.seed + RANKS * step + part) for part in range(RANKS)]
        mine = whole if me.size == 1 else [whole[me.rank]]
        distributed.barrier()
        began = time.perf_counter()
        outcome = engine.forward_backward(mine, engine.exchange(mine, []).whole)
        engine.step(1.0)
        engine.model.update_router_bias(outcome.load)
        seconds.append(time.perf_counter() - began)
        losses.append(outcome.metrics["loss"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"losses": losses, "seconds": seconds[1:], "held": held_bytes(), "grown": grown}


def held_bytes() -> int:
    """Bytes of all tensors alive, each memory counted once."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            try:
                if isinstance(thing, torch.Tensor):
                    found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            except (RuntimeError, ReferenceError):
                continue
    return sum(found.values())


def run(case: str, args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Rank 0's figures of one case, with the largest memory of any rank."""
    parts = on_ranks(lambda: work(case, args), ranks, args.limit)
    return {**parts[0], **{name: max(part[name] for part in parts) for name in ("held", "grown")}}


def row(case: str, found: dict[str, Any], plain: dict[str, Any], args: argparse.Namespace) -> Row:
    """One line of the table."""
    from weft.training.plan import step_bytes

    given = CASES[case]
    stage, divided = given.get("zero_stage", 0), given.get("expert_parallel", 1)
    planned = step_bytes(sizes(args.quick), args.tokens, stage, RANKS, expert_parallel=divided)
    error = max(abs(a - b) / b for a, b in zip(found["losses"], plain["losses"]))
    extra = {
        "held_mib": found["held"] / MIB,
        "process_growth_mib": found["grown"] / MIB,
        "planned_state_mib": (planned[0] + planned[2]) / MIB,
        "planned_peak_mib": sum(planned) / MIB,
        "one_process_held_mib": plain["held"] / MIB,
        "loss_after": found["losses"][-1],
    }
    note = f"held {extra['held_mib']:.0f} MiB, growth {extra['process_growth_mib']:.0f} MiB"
    ours, rival = statistics.median(found["seconds"]), statistics.median(plain["seconds"])
    return compare(case, ours, rival, unit="s", error=error, note=note, extra=extra)


def main() -> None:
    """Run the table."""
    parser = speed_parser("zero", __doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=None, help="tokens of one process in one step")
    parser.add_argument("--steps", type=int, default=None, help="steps of every case; the first is not timed")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a case counts as failed")
    args = parser.parse_args()
    args.tokens = args.tokens or (256 if args.quick else 1024)
    args.steps = args.steps or (3 if args.quick else 6)
    args.threads = 1  # per process; and a process is forked safely while it has no threads
    start(args)
    from weft.training.deepspeed_engine import import_deepspeed  # read once, before the ranks are forked

    import_deepspeed(torch.device("cpu"))
    plain = run("one process", args, 1)
    rows = [row(case, run(case, args, RANKS), plain, args) for case in (QUICK if args.quick else CASES)]
    finish(rows, args)


if __name__ == "__main__":
    main()
