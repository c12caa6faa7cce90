"""`weft eval` and `weft lm-eval`: scores of checkpoints and rivals on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def evaluate(
    checkpoint: str,
    tasks: str = "generalist-mini",
    out: str = "evaluation",
    data: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    episodes: int | None = None,
    batch: int = 16,
    workers: int = 1,
    seed: int = 0,
    missing: bool = False,
    corrupt: bool = False,
    device: str = "auto",
    json: str | None = None,
) -> None:
    """Score checkpoints and rivals on tasks; a second call asks only what is missing.

    Args:
        checkpoint: a checkpoint or run folder, `hf:FOLDER` (a transformers model), `sklearn:svm` or `sklearn:nearest`;
            several with commas between them give one table and a comparison page.
        tasks: task files, folders of them, or suites of this package, with commas between them.
        out: folder for results.json, records, media and compare.html.
        data: folder that the paths in task files count from; default: the folder of each task file.
        shots: demonstrations per question, instead of each task's own number.
        limit: documents per task at most.
        episodes: episodes per control task, instead of each task's own number.
        batch: questions that are asked together.
        workers: threads that read and ask.
        seed: of demonstrations, sampling and corruption.
        missing: also ask with each modality and each pair of modalities removed.
        corrupt: also ask with spoilt inputs.
        device: where to run.
        json: file for the figures of all models with machine, date and command, for documents to quote.
    """
    import sys

    from rich.console import Console

    from weft.benchmarks.harness.page import compare
    from weft.benchmarks.harness.quoted import quote
    from weft.benchmarks.harness.rivals import open_model
    from weft.benchmarks.harness.runner import EvalConfig
    from weft.benchmarks.harness.runner import evaluate as run
    from weft.benchmarks.harness.table import progress, show
    from weft.benchmarks.harness.task import find_tasks

    found = find_tasks(tasks)
    rooted = [(task, Path(data) if data else base) for task, base in found]
    config = EvalConfig(
        shots=shots,
        limit=limit,
        episodes=episodes,
        batch=batch,
        workers=workers,
        seed=seed,
        missing=missing,
        corrupt=corrupt,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no edge
    results: dict[str, dict[str, Any]] = {}
    for name in [c for c in checkpoint.split(",") if c]:
        label, model = open_model(name, device, taken=results)
        with progress(console, label) as tick:
            results[label] = run(model, rooted, Path(out) / label, config, name=name, progress=tick)
    show(console, results)
    page = compare({label: Path(out) / label for label in results}, Path(out) / "compare.html")
    if json:
        quote(results, json, ["weft", *sys.argv[1:]])
    console.print(f"results: {out}/*/results.json, page: {page}")


def lm_eval(argv: Sequence[str]) -> None:
    """lm-eval's command line with weft as its model."""
    from weft.benchmarks.harness.lm_eval_model import command_line

    command_line(argv)


lm_eval.raw = True  # type: ignore[attr-defined]
