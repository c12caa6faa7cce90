"""The main job: world, shards, tokenizers, streams, ONE model, specialists, evaluation, report; each stage once, resumable.

In: a folder and a time budget. Out, in the folder: `world/ shards/ tokenizer/ streams/ run/ specialists.json report.html
report.json`.
A stage that finished leaves `.stages/NAME.json` (its seconds) and is skipped by the next call; training itself goes on from its
last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.benchmarks.world import recipe
from weft.benchmarks.world.build import build_world
from weft.benchmarks.world.evaluate import Result, evaluate
from weft.benchmarks.world.fit import WorldTokens, fit_tokenizers, one_thread
from weft.benchmarks.world.specialists import SPECIALISTS, Score, score_specialists
from weft.benchmarks.world.tasks import TASKS
from weft.tokenizers.bundle import StreamTokenizer
from weft.training.config import RunConfig
from weft.training.data.prepare import prepare
from weft.training.data.shards import ShardDataset
from weft.training.data.stored import store_source
from weft.training.parallel import each, kept_workers

if TYPE_CHECKING:
    from weft.inference.generalist import Generalist

Progress = Callable[[str, float, str], None]
"""Called with the stage, the fraction of it that is done and a word about it."""


class QuickstartError(ValueError):
    """The folder holds another quickstart, or an argument is out of range."""


@dataclass(frozen=True)
class Quickstart:
    """What one call is about; a folder serves one of them."""

    scale: float = 1.0
    """Share of the sample world's documents (of its test documents, the square root of it)."""
    minutes: float = 10.5
    """Time for training."""
    seed: int = 0
    max_steps: int | None = None
    """Train for so many steps instead of `minutes`."""
    batch_tokens: int = recipe.BATCH_TOKENS
    """Tokens of a step; a short run learns more from many small steps."""
    limit: int | None = None
    """Test documents per task; None = all. An episode counts as ten of them."""
    shares: dict[str, float] = field(default_factory=dict)
    """Percent of the training tokens of single sources, instead of the world's."""
    lr: float = recipe.LR
    device: str = "auto"
    tokens: WorldTokens = field(default_factory=WorldTokens)
    sizes: dict[str, Any] = field(default_factory=dict)
    """Fields of the model to replace."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise QuickstartError(f"minutes={self.minutes} must lie above 0 and at most a day")


def short(seed: int = 0, device: str = "auto") -> Quickstart:
    """Two to three minutes on two CPU cores: every stage and every task on a fifth of the documents, learnt a little."""
    return Quickstart(scale=0.2, seed=seed, device=device, limit=100, tokens=WorldTokens(codec_steps=300), **recipe.SHORT)


@dataclass
class Stages:
    """Where the work stands."""

    folder: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Do a stage unless it is done."""
        mark = self.folder / ".stages" / f"{name}.json"
        if mark.exists():
            self.seconds[name] = json.loads(mark.read_text())["seconds"]
            self.progress(name, 1.0, "done before")
            return
        self.progress(name, 0.0, "")
        begun = time.perf_counter()
        work()
        self.seconds[name] = round(time.perf_counter() - begun, 2)
        mark.parent.mkdir(parents=True, exist_ok=True)
        write(mark, {"seconds": self.seconds[name]})
        self.progress(name, 1.0, f"{self.seconds[name]:.0f} s")


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def claim(folder: Path, config: Quickstart) -> None:
    """One folder, one quickstart. Raises `QuickstartError` if another one lives there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / "quickstart.json", json.loads(json.dumps(asdict(config)))
    if path.exists() and json.loads(path.read_text()) != mine:
        raise QuickstartError(f"{folder} holds a quickstart with other settings; choose another --out or remove the folder")
    write(path, mine)


def quickstart(folder: str | Path, config: Quickstart | None = None, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run every stage and return what `report.json` holds."""
    config, root = config or Quickstart(), Path(folder)
    claim(root, config)
    stages = Stages(root, progress or (lambda stage, done, note: None))
    with kept_workers():
        return run_stages(root, config, stages)


def run_stages(root: Path, config: Quickstart, stages: Stages) -> dict[str, Any]:
    """What is not done yet, in order."""
    say, world = stages.progress, root / "world"
    stages.run(
        "world",
        lambda: build_world(world, scale=config.scale, seed=config.seed, progress=lambda s, f: say("world", f, s)),
    )
    stages.run("shards", lambda: shard(world, root / "shards", say))
    stages.run("tokenizers", lambda: tokenize(world, root, config, say))
    stages.run("streams", lambda: make_streams(root, config, say))
    stages.run("training", lambda: train_model(root, config, say))
    stages.run("specialists", lambda: specialise(root, say))
    results: dict[str, Result] = {}
    done = root / "report.json"
    if done.exists() and (root / ".stages" / "evaluation.json").exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    stages.run("evaluation", lambda: results.update(examine(root, config, say)))
    if not results:  # an earlier call evaluated, but did not live to report
        results = examine(root, config, say)
    from weft.benchmarks.world.report import report

    return report(root, results, stages.seconds)


def shard(world: Path, out: Path, say: Progress) -> None:
    """Every source's training and validation documents as shards, by the same path as a user's data."""
    names = recipe.sources(world)
    each(partial(shard_source, world, out), names, done=lambda count, name: say("shards", count / len(names), name))


def shard_source(world: Path, out: Path, name: str) -> None:
    """One source."""
    manifest = world / f"{name}.jsonl"  # beside the media: a manifest may not name files outside its folder
    parts = [world / f"{name}.{split}.jsonl" for split in ("train", "val")]
    manifest.write_text("".join(part.read_text("utf-8") for part in parts if part.exists()), encoding="utf-8")
    prepare(manifest, out / name)


def tokenize(world: Path, root: Path, config: Quickstart, say: Progress) -> None:
    """Fit and save the tokenizers."""
    tokenizer, reports = fit_tokenizers(world, config.tokens, progress=lambda s, f: say("tokenizers", f, s))
    draft = root / "tokenizer.part"
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer.save(draft)
    shutil.rmtree(root / "tokenizer", ignore_errors=True)
    draft.rename(root / "tokenizer")
    write(root / "codecs.json", {name: asdict(r) for name, r in reports.items()})


def run_of(root: Path, config: Quickstart) -> RunConfig:
    """What is trained, and how: on a GPU in one process, on a CPU in one single-threaded process per core.

    Small matrices gain little from a second thread, and every operation waits for the slower one; two processes that exchange
    gradients once a step do not wait.
    """
    run = recipe.run_config(
        root,
        StreamTokenizer.load(root / "tokenizer"),
        seed=config.seed,
        sizes=config.sizes,
        shares=config.shares,
        lr=config.lr,
    )
    ranks = recipe.ranks(config.device)
    warmup = run.schedule.warmup_steps
    if config.max_steps:
        warmup = min(warmup, config.max_steps // 10)
    return replace(
        run,
        max_steps=config.max_steps,
        max_seconds=None if config.max_steps else config.minutes * 60,
        schedule=replace(run.schedule, warmup_steps=warmup),
        data=replace(run.data, batch_tokens=config.batch_tokens, micro_batches=ranks),
        engine=replace(run.engine, device=config.device, threads=1 if ranks > 1 else None),
    )


def make_streams(root: Path, config: Quickstart, say: Progress) -> None:
    """Every training document as tokens: a model this small learns from one in less time than it takes to make."""
    data = run_of(root, config).data
    sources = sorted(data.sources, key=lambda s: -len(ShardDataset(s.path)))  # the longest first
    each(
        partial(store_source, config=data, plan=data.loss_plan, tokenizer_folder=root / "tokenizer"),
        sources,
        done=lambda count, source: say("streams", count / len(sources), source.name),
    )


def train_model(root: Path, config: Quickstart, say: Progress) -> None:
    """One model on all of it."""
    run = run_of(root, config)
    ranks = run.data.micro_batches
    path = root / "run.yaml"
    path.write_text(run.to_yaml(), encoding="utf-8")
    if ranks == 1:
        from weft.training.train import train

        train(run, callbacks=[lambda moment: watch(Path(run.folder), run.max_steps, say)])
        return
    launch(path, ranks, lambda: watch(Path(run.folder), run.max_steps, say), root / "training.log")


def launch(path: Path, ranks: int, tick: Callable[[], None], log: Path) -> None:
    """Run a training file on `ranks` processes of this machine. Raises `QuickstartError` with the end of the log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a", encoding="utf-8") as out, ended_by_signal():
        work = subprocess.Popen(
            [*command, "-m", "weft.training.train", str(path)], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while work.poll() is None:
                tick()
                time.sleep(1)
        except BaseException:
            work.terminate()  # every rank saves a checkpoint and exits
            work.wait(60)
            raise
    if work.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise QuickstartError(f"training stopped with status {work.returncode}; the end of {log}:\n{end}")


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """SIGTERM ends this process by an exception, so that it takes the ranks along instead of leaving them training."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def watch(run: Path, steps: int | None, say: Progress) -> None:
    """Report how far a run is, from what it writes; the number of its steps is its own estimate unless it was given."""
    try:
        total = steps or json.loads((run / "horizon.json").read_text())["decisions"][-1][1]
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            rows = [json.loads(row) for row in file.read().split(b"\n")[1:-1]]
        row = [row for row in rows if "loss" in row][-1]
    except (OSError, ValueError, LookupError):
        return
    say("training", min(1.0, (row["step"] + 1) / total), f"step {row['step'] + 1} of {total}, loss {row['loss']:.3f}")


def specialise(root: Path, say: Progress) -> None:
    """Fit and score the specialists."""
    names = list(SPECIALISTS)
    found = each(
        partial(score_specialist, root / "world"),
        names,
        done=lambda count, name: say("specialists", count / len(names), name),
    )
    write(root / "specialists.json", {name: asdict(score) for name, score in zip(names, found)})


def score_specialist(world: Path, name: str) -> Score:
    """One of them."""
    return score_specialists(world, [name])[name]


def examine(root: Path, config: Quickstart, say: Progress) -> dict[str, Result]:
    """Evaluate the trained model: the tasks side by side on a CPU's cores, one after the other on a GPU."""
    names = sorted(TASKS, key=lambda name: TASKS[name].kind != "control")  # the longest first
    found = each(
        partial(answer, root, config),
        names,
        done=lambda count, name: say("evaluation", count / len(names), name),
        processes=recipe.ranks(config.device),
    )
    made = dict(zip(names, found))
    return {name: made[name] for name in TASKS}


def answer(root: Path, config: Quickstart, name: str) -> Result:
    """One task."""
    with one_thread():
        return evaluate(root / "world", trained(root, config.device), tasks=[name], limit=config.limit)[name]


@lru_cache(maxsize=1)
def trained(root: Path, device: str) -> Generalist:
    """The model of a finished run."""
    from weft.inference.load import load

    return load(root / "run", device=device)
