"""`weft train`, `weft plan`, `weft export`: a run in one process, what a run would need, and what a run leaves to others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from weft.commands.arguments import UsageError

VOCABULARY = 65_536
"""Ids that `plan` assumes where no tokenizer says otherwise."""
FEATURES = {"image": 768, "video": 1536, "audio": 320, "sensor": 1}
"""Numbers per token that `plan` assumes: 16 x 16 RGB patches, two frames of them, 4 frames of 80 mel bands, one reading."""


def train(run: str, *overrides: str, dry_run: bool = False, gpu_hour: float | None = None) -> None:
    """Train or go on with the run that a YAML file describes.

    One process. Many GPUs use the same file: torchrun --nproc-per-node 8 -m weft.training.train RUN.yaml

    Args:
        run: run file, for example examples/tiny.yaml.
        overrides: section.key=value, for example optimizer.lr=3e-4.
        dry_run: build everything, take two steps in a scratch folder, and say what the whole run needs.
        gpu_hour: with --dry-run, the price of one GPU (or process) for one hour.
    """
    from weft.training.config import load_run
    from weft.training.train import train as run_it

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    wrong = [word for word in overrides if "=" not in word]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no setting; write section.key=value, for example optimizer.lr=3e-4")
    config = load_run(run, overrides)
    print(config.to_yaml(), flush=True)
    if dry_run:
        from weft.training.dry_run import dry_run as try_it

        print(try_it(config, gpu_hour=gpu_hour))
        return
    result = run_it(config)
    loss = f", loss {result.metrics['loss']:.3f}" if "loss" in result.metrics else ""
    print(
        f"{result.steps} steps{loss}; the model is in {result.folder / 'final'}, figures in {result.folder / 'metrics.jsonl'}"
    )


def plan(
    model: str,
    gpus: int = 8,
    gpu: str = "h200",
    row_tokens: int = 16_384,
    micro_batches: int = 1,
    tokens: float | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    recompute: bool = True,
    mfu: float = 0.35,
    measured: str | None = None,
    expert_parallel: int = 1,
    gpu_hour: float | None = None,
) -> None:
    """Estimate memory, speed, days and cost for every ZeRO stage, without building anything.

    Args:
        model: preset (tiny small base large xl), run file, or checkpoint folder.
        gpus: how many.
        gpu: which, for example h200, h100, a100, rtx4090.
        row_tokens: tokens of one micro-batch on one GPU.
        micro_batches: accumulation steps per GPU.
        tokens: tokens of the whole run, for example 1e11; gives days and cost.
        precision: bf16 is autocast over float32 weights and moments.
        recompute: recompute activations in the backward pass.
        mfu: share of the GPU's peak that is assumed, until a run has been measured.
        measured: run folder whose measured MFU replaces the assumed one.
        expert_parallel: ranks that divide the routed experts between them.
        gpu_hour: price of one GPU for one hour.
    """
    from weft.training.plan import measured_mfu, table

    config, where = sizes(model)
    guess = "a guess until a run has been measured: --measured RUN"
    if measured is not None:
        mfu, guess = measured_mfu(Path(measured)), f"measured in {measured}"
    choices: dict[str, Any] = {"precision": precision, "recompute": recompute, "assumed_mfu": mfu, "gpu_hour": gpu_hour}
    choices["expert_parallel"] = expert_parallel
    counts: dict[str, Any] = {"row_tokens": row_tokens, "micro_batches": micro_batches, "total_tokens": tokens}
    rows = table(config, gpus=gpus, gpu=gpu, **counts, **choices)
    print(f"{where}; speed: {mfu:.0%} of the {gpu}'s peak (MFU), {guess}\n{rows}")


def sizes(model: str) -> tuple[Any, str]:
    """A `ModelConfig` and where it came from."""
    import json

    from weft.model.config import ModelConfig
    from weft.model.presets import PRESETS
    from weft.training.config import load_run

    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        run = load_run(path)
        folder = run.data.tokenizer
        if run.model.init is not None:
            return sizes(str(run.model.init))
        if folder is not None and folder.is_dir():
            from weft.commands.stream import open_tokenizer

            tokenizer = open_tokenizer(folder)
            features = {m: f for m, f in tokenizer.feature_sizes().items() if f}
            found = run.model.config(len(tokenizer.vocabulary), tokenizer.vocabulary.slices, features, tokenizer.resample())
            return found, f"{path} with {folder}"
        return run.model.config(VOCABULARY, ((0, VOCABULARY),), FEATURES), f"{path} with {VOCABULARY:,} ids assumed"
    if path.is_dir():
        from weft.inference.load import find

        folder = find(path)
        return ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))), str(folder)
    if model not in PRESETS:
        raise UsageError(f"{model!r} is no preset ({', '.join(PRESETS)}), run file or checkpoint folder")
    from weft.model.presets import preset

    found = preset(model, vocab_size=VOCABULARY, slices=((0, VOCABULARY),), feature_sizes=FEATURES)
    return found, f"preset {model} with {VOCABULARY:,} ids assumed"


def export(
    checkpoint: str, out: str | None = None, dtype: Literal["keep", "fp32", "bf16"] = "keep", average: bool = False
) -> None:
    """Write one folder with a model and its tokenizers, ready to load or to publish.

    Args:
        checkpoint: run folder, checkpoint or final/.
        out: folder to write; it must be empty or new.
        dtype: keep what is stored, or convert.
        average: take the averaged weights (of a run with checkpoint.ema).
    """
    from weft.training.export import export as write

    if out is None:
        raise UsageError("--out is missing; name the folder that the model goes to")
    folder = write(checkpoint, out, dtype, average)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB; use it with weft.load({str(folder)!r}) or weft generate {folder} ...")
