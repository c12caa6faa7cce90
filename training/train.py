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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training import distributed
from weft.training.batches import Batches
from weft.training.build import build, used
from weft.training.checkpoint import replace_file
from weft.training.config import RunConfig, load_run
from weft.training.loop import Loop
from weft.training.parts import Callback, Evaluate, RunResult

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
        with used(config, "folder", repair="choose a folder that can be written"):
            Path(config.folder).mkdir(parents=True, exist_ok=True)
            replace_file(Path(config.folder) / "config.yaml", config.to_yaml())
    return Loop(parts).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of a worker process. A user's mistake prints one sentence and returns 2."""
    parser = argparse.ArgumentParser(
        prog="python -m weft.training.train", description="Train the run that a YAML file describes."
    )
    parser.add_argument("run", help="run file, for example examples/tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by DeepSpeed's launcher")
    parser.add_argument("--dry-run", action="store_true", help="build everything, take two steps, print the plan")
    parser.add_argument(
        "--gpu-hour", type=float, default=None, help="with --dry-run: price of one GPU (or process) for an hour"
    )
    found = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_run(found.run, found.overrides)
        if os.environ.get("RANK", "0") == "0":
            print(config.to_yaml(), flush=True)
        if found.dry_run:
            from weft.training.dry_run import dry_run

            said = dry_run(config, gpu_hour=found.gpu_hour)
            if os.environ.get("RANK", "0") == "0":
                print(said)
        else:
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
