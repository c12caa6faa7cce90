"""Build a run from its config and train: `train(config)` in Python, `python -m weft.training.train RUN.yaml` by a launcher.

weft train RUN.yaml optimizer.lr=3e-4                                   one process
torchrun --nproc-per-node 8 -m weft.training.train RUN.yaml             many, any engine
deepspeed --module weft.training.train RUN.yaml                         the same, DeepSpeed's launcher (adds --local_rank)
srun --ntasks-per-node 8 python -m weft.training.train RUN.yaml         with MASTER_ADDR and MASTER_PORT exported
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weft.model.config import ModelConfig
from weft.model.count import num_params
from weft.model.save import from_pretrained
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training import distributed, finetune
from weft.training.batches import Batches, LoaderBatches
from weft.training.checkpoint import replace_file, verify
from weft.training.config import ConfigError, RunConfig, load_run
from weft.training.data.loader import Loader
from weft.training.engine import Engine, LocalEngine
from weft.training.loop import Callback, Evaluate, Loop, Parts, RunResult
from weft.training.plan import GIB, step_bytes
from weft.training.pretrained import load_trunk, load_vision
from weft.training.random import torch_seed

log = logging.getLogger("weft.training")


def train(
    config: RunConfig,
    *,
    source: Batches | None = None,
    tokenizer: Any = None,
    model: Transformer | None = None,
    validation: Sequence[Batch] = (),
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train (or continue) the run that `config` describes and return where it is and how it went.

    `source`, `tokenizer` and `model` replace what the config names, for training on data in memory. `evaluate(model, step)`
    returns figures to log at every evaluation; each callback sees a `Moment` after every step.
    """
    parts = build(
        config, source=source, tokenizer=tokenizer, model=model, validation=validation, evaluate=evaluate, callbacks=callbacks
    )
    if parts.engine.world.first:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
        replace_file(Path(config.folder) / "config.yaml", config.to_yaml())
    return Loop(parts).run()


def build(
    config: RunConfig,
    *,
    source: Batches | None = None,
    tokenizer: Any = None,
    model: Transformer | None = None,
    validation: Sequence[Batch] = (),
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
) -> Parts:
    """Everything a loop needs, built in the order in which mistakes are cheapest to find."""
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = distributed.start(config.engine.timeout_s)
    if config.data.micro_batches % world.size:
        raise ConfigError(
            f"data.micro_batches={config.data.micro_batches} must be a multiple of the {world.size} ranks that share a step"
        )
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config)
    source = source if source is not None else open_shards(config, tokenizer, world)
    if not validation and config.data.validation:
        validation = held_out(config, tokenizer, world)
    model = model if model is not None else build_model(config, tokenizer)
    finetune.apply(model, config.finetune, seed=torch_seed(config.seed, "lora"))
    return Parts(
        config=config,
        engine=build_engine(config, model, world),
        source=source,
        tokenizer=tokenizer,
        validation=list(validation),
        evaluate=evaluate,
        callbacks=callbacks,
        lora_scale=config.finetune.alpha / config.finetune.rank,
    )


def build_engine(config: RunConfig, model: Transformer, world: distributed.World) -> Engine:
    """The engine that the config names. DeepSpeed is imported only if it is wanted."""
    if config.engine.kind == "local":
        return LocalEngine(model, config.engine, config.optimizer, config.loss)
    from weft.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config.engine, config.optimizer, config.loss, config.data.micro_batches // world.size)


def build_model(config: RunConfig, tokenizer: Any) -> Transformer:
    """A model with fresh weights that depend on the seed alone, or with those of a folder."""
    section = config.model
    if section.init is not None:
        verify(section.init)
        model = from_pretrained(section.init)
        _same_vocabulary(model.config, tokenizer, section.init)
        return model.train()
    if tokenizer is None:
        raise ConfigError("a run needs data.tokenizer (a folder that a StreamTokenizer was saved to) or a tokenizer object")
    vocabulary = tokenizer.vocabulary
    sizes = section.config(len(vocabulary), vocabulary.slices, {m: f for m, f in tokenizer.feature_sizes().items() if f})
    state = torch.get_rng_state()
    torch.manual_seed(torch_seed(config.seed, "weights"))
    model = Transformer(sizes)
    torch.set_rng_state(state)
    done = load_trunk(model, section.trunk, vocabulary.spans["text"]) if section.trunk is not None else []
    done += load_vision(model, section.vision) if section.vision is not None else []
    for line in done:
        log.info("%s", line)
    return model


def _same_vocabulary(config: ModelConfig, tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    slices = tuple(tuple(pair) for pair in tokenizer.vocabulary.slices)
    if config.slices != slices:
        raise ConfigError(
            f"{folder} has another vocabulary ({config.vocab_size} ids, the tokenizer has {len(tokenizer.vocabulary)}); "
            f"use the tokenizer in {folder / 'tokenizer'}"
        )


def load_tokenizer(config: RunConfig) -> Any:
    """The `StreamTokenizer` of the run's folder, or None if the config names none."""
    if config.data.tokenizer is None:
        return None
    from weft.tokenizers.bundle import StreamTokenizer

    return StreamTokenizer.load(config.data.tokenizer)


def open_shards(config: RunConfig, tokenizer: Any, world: distributed.World) -> Batches:
    """The loader over `data.sources`."""
    if not config.data.sources or tokenizer is None:
        raise ConfigError(
            "a run needs data.sources (folders that `weft prepare` wrote) and data.tokenizer (a tokenizer's folder)"
        )
    loader = Loader(
        config.data.sources,
        tokenizer,
        config.data,
        seed=config.seed,
        plan=config.data.loss_plan,
        rank=world.rank,
        world=world.size,
        quarantine=config.folder / "quarantine",
        tokenizer_folder=config.data.tokenizer,
    )
    return LoaderBatches(loader)


def held_out(config: RunConfig, tokenizer: Any, world: distributed.World) -> list[Batch]:
    """The same `evaluation.batches` micro-batches at every evaluation, whatever the training order is."""
    micro = -(-config.evaluation.batches // world.size) * world.size
    section = replace(
        config.data, micro_batches=micro, batch_tokens=config.data.micro_tokens * micro, draws_per_step=None, dropout={}
    )
    loader = Loader(
        config.data.validation, tokenizer, section, seed=0, plan=config.data.loss_plan, rank=world.rank, world=world.size,
        tokenizer_folder=config.data.tokenizer,
    )  # fmt: skip
    with loader:
        return loader.step(0).batches


def dry_run(config: RunConfig, **given: Any) -> str:
    """Build everything, take two steps on real data in a scratch folder, and say what the whole run needs."""
    with tempfile.TemporaryDirectory(prefix="weft-dry-") as scratch:
        tracking = replace(config.tracking, trackers=(), panel="none", plots=False)
        short = replace(config, folder=Path(scratch), max_steps=2, max_seconds=None, tracking=tracking)
        times: list[float] = [time.monotonic()]
        parts = build(short, callbacks=[lambda moment: times.append(time.monotonic())], **given)
        times[0] = time.monotonic()
        result = Loop(parts).run()
    model, world = parts.engine.model.config, parts.engine.world
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    sizes = step_bytes(model, config.data.micro_tokens, stage, world.size, config.engine.precision, config.engine.recompute)
    names = ("weights", "gradients", "moments", "activations")
    step_s = times[-1] - times[-2]
    lines = [f"model: {num_params(model):,} weights, loss {result.metrics['loss']:.3f} after 2 steps"]
    lines += [
        f"memory per rank: {sum(sizes) / GIB:.3f} GiB = " + " + ".join(f"{n} {s / GIB:.3f}" for n, s in zip(names, sizes))
    ]
    lines += [f"speed: {step_s:.3f} s per step, {config.data.batch_tokens / step_s:,.0f} tokens/s (second step, not warm)"]
    if config.max_steps is not None:
        lines += [f"whole run: {config.max_steps} steps, about {config.max_steps * step_s / 3600:.2f} h"]
    elif config.max_seconds is not None:
        lines += [f"whole run: {config.max_seconds:.0f} s, about {int(config.max_seconds / step_s)} steps"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of a worker process. A user's mistake prints one sentence and returns 2."""
    parser = argparse.ArgumentParser(
        prog="python -m weft.training.train", description="Train the run that a YAML file describes."
    )
    parser.add_argument("run", help="run file, for example examples/tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by DeepSpeed's launcher")
    parser.add_argument("--dry-run", action="store_true", help="build everything, take two steps, print the plan")
    found = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_run(found.run, found.overrides)
        if found.dry_run:
            print(dry_run(config))
        else:
            if os.environ.get("RANK", "0") == "0":
                print(config.to_yaml(), flush=True)
            result = train(config)
            log.info("done: %d steps in %s", result.steps, result.folder)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        log.debug("traceback", exc_info=True)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    distributed.leave(code)
