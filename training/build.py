"""A run's parts from its config: tokenizer, shards, held-out batches, model, engine.

In: a `RunConfig`, or objects that stand in for what it names. Out: `Parts`. A mistake that only shows here (a folder that
is not there, another vocabulary, a pattern that fits nothing) is told with the file, line and key that said it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from weft.model.config import ModelConfig, resamplers
from weft.model.save import from_pretrained
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training import distributed, finetune
from weft.training.batches import Batches, LoaderBatches
from weft.training.checkpoint import read_json, verify
from weft.training.config import ConfigError, RunConfig
from weft.training.data.loader import Loader
from weft.training.engine import Engine, LocalEngine
from weft.training.parts import Callback, Evaluate, Parts
from weft.training.pretrained import load_trunk, load_vision
from weft.training.random import torch_seed
from weft.training.strict import blamed

log = logging.getLogger("weft.training")


@contextlib.contextmanager
def used(config: RunConfig, *key: str | int, repair: str = "") -> Iterator[None]:
    """A mistake that shows only when a value is used still names the file, the line and the key that said it."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        value: Any = config
        for part in key:
            value = getattr(value, str(part))
        inside = {f.name: None for f in fields(value)} if is_dataclass(value) else {}
        where = config.at(*blamed(key, inside, str(error)))
        raise ConfigError(f"{where}: {error}{'; ' if repair else ''}{repair}") from error


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
    world = distributed.start(config.engine.timeout_s, config.engine.device)
    if config.data.micro_batches % world.size:
        raise ConfigError(
            f"{config.at('data', 'micro_batches')}={config.data.micro_batches} must be a multiple of the {world.size} ranks "
            "that share a step"
        )
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config)
    source = source if source is not None else open_shards(config, tokenizer, world)
    if not validation and config.data.validation:
        validation = held_out(config, tokenizer, world)
    model = model if model is not None else build_model(config, tokenizer)
    with used(config, "finetune"):
        finetune.apply(model, config.finetune, seed=torch_seed(config.seed, "lora"))
    with used(config, "engine"):
        engine = build_engine(config, model, world)
    return Parts(
        config=config,
        engine=engine,
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
        with used(config, "model", "init"):
            verify(section.init)
            model = from_pretrained(section.init)
            _same_vocabulary(model.config, tokenizer, section.init)
        return model.train()
    if tokenizer is None:
        raise ConfigError(
            f"{config.at('data')} needs tokenizer: a folder that `weft fit-tokenizer` (or StreamTokenizer.save) wrote; add it"
        )
    vocabulary = tokenizer.vocabulary
    with used(config, "model", "sizes"):
        features = {m: f for m, f in tokenizer.feature_sizes().items() if f}
        sizes = section.config(len(vocabulary), vocabulary.slices, features, tokenizer.resample())
    state = torch.get_rng_state()
    torch.manual_seed(torch_seed(config.seed, "weights"))
    model = Transformer(sizes)
    torch.set_rng_state(state)
    done = []
    with used(config, "model", "trunk"):
        done += load_trunk(model, section.trunk, vocabulary.spans["text"]) if section.trunk is not None else []
    with used(config, "model", "vision"):
        done += load_vision(model, section.vision) if section.vision is not None else []
    for line in done:
        log.info("%s", line)
    return model


def _same_vocabulary(config: ModelConfig, tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    slices = tuple(tuple(pair) for pair in tokenizer.vocabulary.slices)
    if config.slices != slices:
        raise ValueError(
            f"{folder} has another vocabulary ({config.vocab_size} ids, the tokenizer has {len(tokenizer.vocabulary)}); "
            f"use the tokenizer in {folder / 'tokenizer'}"
        )
    if resamplers(config) != tokenizer.resample():
        raise ValueError(
            f"{folder} reads media through resamplers {resamplers(config)}, the tokenizer writes for {tokenizer.resample()}; "
            f"use the tokenizer in {folder / 'tokenizer'}"
        )
    stated = folder / "tokenizer" / "digest.json"
    parts = read_json(stated)["parts"] if stated.exists() else {}
    now = {"vocabulary": tokenizer.vocabulary, **tokenizer.tokenizers}
    other = [name for name in now if name in parts and parts[name] != now[name].digest()]
    if {"vocabulary", "text"} & set(other):
        raise ValueError(
            f"{folder} was trained with another tokenizer (its {' and '.join(other)} differ): its ids would mean something "
            f"else; use the tokenizer in {folder / 'tokenizer'}"
        )
    if other:
        log.warning("the %s tokenizers are not those that %s was trained with", " and ".join(other), folder)


def load_tokenizer(config: RunConfig) -> Any:
    """The `StreamTokenizer` of the run's folder, or None if the config names none."""
    if config.data.tokenizer is None:
        return None
    from weft.tokenizers.bundle import StreamTokenizer

    with used(config, "data", "tokenizer", repair="write it with `weft fit-tokenizer SHARDS --out FOLDER`"):
        return StreamTokenizer.load(config.data.tokenizer)


def open_shards(config: RunConfig, tokenizer: Any, world: distributed.World) -> Batches:
    """The loader over `data.sources`."""
    if not config.data.sources or tokenizer is None:
        lacks = "sources: a list of folders that `weft prepare` wrote" if not config.data.sources else "tokenizer: its folder"
        raise ConfigError(f"{config.at('data')} needs {lacks}; add it")
    with from_sources(config, "sources"):
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


@contextlib.contextmanager
def from_sources(config: RunConfig, name: Literal["sources", "validation"]) -> Iterator[None]:
    """A mistake in shards or in the mixture is told with the line of the source that its message names."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        text, sources = str(error), getattr(config.data, name)
        found = [i for i, s in enumerate(sources) if f"{s.name!r}" in text or s.path.rstrip("/") in text]
        key = ("data", name, found[0]) if found else blamed(("data",), {f.name: None for f in fields(config.data)}, text)
        raise ConfigError(f"{config.at(*key)}: {text}") from error


def held_out(config: RunConfig, tokenizer: Any, world: distributed.World) -> list[Batch]:
    """The same `evaluation.batches` micro-batches at every evaluation, whatever the training order is."""
    micro = -(-config.evaluation.batches // world.size) * world.size
    section = replace(
        config.data, micro_batches=micro, batch_tokens=config.data.micro_tokens * micro, draws_per_step=None, dropout={}
    )
    with from_sources(config, "validation"):
        loader = Loader(
            config.data.validation, tokenizer, section, seed=0, plan=config.data.loss_plan, rank=world.rank, world=world.size,
            tokenizer_folder=config.data.tokenizer,
        )  # fmt: skip
        with loader:
            return loader.step(0).batches
