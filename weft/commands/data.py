"""`weft prepare` and `weft data-report`: documents into shards, and what is in them."""

from __future__ import annotations

from typing import Any

from weft.commands.arguments import UsageError


def prepare(
    source: str,
    out: str | None = None,
    workers: int = 0,
    shard_mib: float = 256.0,
    timeout_s: float = 30.0,
    columns: dict[str, str] | None = None,
    name: str | None = None,
    rate_hz: float | None = None,
) -> None:
    """Pack documents into shards. Run it again after an interruption and it goes on where it stopped.

    Args:
        source: manifest.jsonl, a tar file or URL, minari:NAME, a folder of Parquet files, or a folder of media.
        out: folder of the shards.
        workers: processes that decode and check media; 0 = this one.
        shard_mib: size at which a shard is closed, MiB.
        timeout_s: seconds that one document may take to decode (with workers).
        columns: Parquet columns and what they hold, for example '{"caption": "text", "photo": "image"}'.
        name: name of the source in reports; the folder's name if left out.
        rate_hz: steps per second of Minari episodes.
    """
    if out is None:
        raise UsageError("--out is missing; name the folder that the shards go to")
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from weft.training.data.sources import prepare_from

    text = "{task.completed:,.0f} documents, {task.fields[mib]:,.1f} MiB, {task.fields[refused]:,} refused"
    console = Console(stderr=True)
    with Progress(
        TextColumn(text), TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None, mib=0.0, refused=0)
        report = prepare_from(
            source,
            out,
            columns=columns,
            name=name,
            rate_hz=rate_hz,
            workers=workers,
            shard_bytes=int(shard_mib * 2**20),
            timeout_s=timeout_s,
            progress=lambda p: bar.update(task, completed=p.records, mib=p.bytes / 2**20, refused=p.refused),
        )
    kept = ", ".join(f"{n:,} {split}" for split, n in report.samples.items())
    print(f"{report.folder}: {kept} in {report.shards} shards, {report.bytes / 2**20:,.1f} MiB, {report.seconds:.1f} s")
    if report.resumed_shards:
        print(f"{report.resumed_shards} of the shards were there from an earlier start")
    refused = sum(report.refused.values())
    print(f"{refused:,} refused" + ("" if refused else ": every document can be used"))
    for reason, count in report.refused.items():
        print(f"  {count:>8,}  {reason}; the first: {report.first[reason]}")
    if refused:
        print(f"each is named, with the reason, in {report.folder}/refused.jsonl")


def fit_tokenizer(
    shards: str,
    out: str | None = None,
    sample: int = 512,
    chunk_s: float = 2.0,
    text_size: int = 4096,
    patch: int = 16,
    max_side: int = 320,
    max_rate_hz: float = 5.0,
    steps: int = 400,
    resample: str = "",
) -> None:
    """Fit tokenizers for every modality of prepared documents, and save them as one folder.

    Args:
        shards: folder of shards, as `weft prepare` writes it.
        out: folder of the tokenizer; runs name it as data.tokenizer.
        sample: documents that are read.
        chunk_s: seconds that clocked segments are merged by; small for control (0.1), large for films.
        text_size: text pieces; fewer where the texts are few.
        patch: side of an image patch, pixels.
        max_side: longest side of a picture, pixels.
        max_rate_hz: most frames per second that are kept of a video.
        steps: training steps of the codecs of pictures and sound; 0 = the model reads media but cannot produce them.
        resample: media that the model reads through a resampler, as modality=rows:positions, for example image=16:4,audio=25:5.
    """
    if out is None:
        raise UsageError("--out is missing; name the folder that the tokenizer goes to")
    from weft.tokenizers.resample import read_resample
    from weft.tokenizers.stream import StreamConfig
    from weft.training.data.records import restore
    from weft.training.data.shards import ShardDataset
    from weft.training.random import permutation

    config = StreamConfig(chunk_s=chunk_s, resample=read_resample(resample))
    dataset = ShardDataset(shards, "train")
    read = [dataset.read(int(i)) for i in permutation(len(dataset), 0, "fit")[:sample]]
    documents = [restore(found.members, found.where) for found in read]
    from weft.tokenizers.defaults import default_tokenizer  # torch, once the shards are known to be there

    tokenizer = default_tokenizer(
        documents,
        config,
        steps=steps,
        patch=patch,
        max_side=max_side,
        max_rate_hz=max_rate_hz,
        text_size=text_size,
    )
    tokenizer.save(out)
    lengths = sorted(len(tokenizer.encode(document)) for document in documents[:64])
    modalities = ", ".join(tokenizer.tokenizers)
    print(f"{out}: {modalities}; {len(tokenizer.vocabulary):,} ids, digest {tokenizer.digest()[:16]}")
    print(f"a document has {lengths[len(lengths) // 2]:,} tokens in the median, {lengths[-1]:,} at most (of {len(lengths)})")


def tokenize(run: str, *overrides: str, workers: int = 1) -> None:
    """Make the streams of a run's sources ahead of training, so that its ranks only copy them. What is there is kept.

    Args:
        run: run file with data.streams_folder, the folder that they go to.
        overrides: section.key=value, for example data.streams_folder=runs/streams.
        workers: sources that are tokenised side by side.
    """
    from functools import partial

    from weft.training.config import load_run
    from weft.training.data.stored import store_source
    from weft.training.parallel import each

    config = load_run(run, overrides)
    data = config.data
    if data.streams_folder is None or data.tokenizer is None:
        raise UsageError("the run needs data.streams_folder and data.tokenizer; add data.streams_folder=FOLDER")
    work = partial(store_source, config=data, plan=data.loss_plan, tokenizer_folder=data.tokenizer)
    paths = each(work, data.sources, processes=workers, done=lambda count, source: print(f"{source.name} is done", flush=True))
    print(f"{data.streams_folder}: {sum(path.stat().st_size for path in paths) / 2**20:,.1f} MiB for {len(paths)} sources")


def report(
    folder: str, out: str | None = None, tokenizer: str | None = None, length: int = 1024, sample: int = 512, examples: int = 12
) -> None:
    """Count what is in a folder of shards, print it, and write a page with examples.

    Args:
        folder: folder of shards, as `weft prepare` writes it.
        out: page to write, for example report.html.
        tokenizer: folder of a tokenizer or checkpoint: documents are then measured in tokens too.
        length: tokens of a packed row, for the waste of packing.
        sample: documents that are measured in tokens.
        examples: documents that the page shows.
    """
    from weft.commands.stream import open_tokenizer
    from weft.training.data.report import data_report as write

    tokens = open_tokenizer(tokenizer) if tokenizer else None
    found = write(folder, out, tokenizer=tokens, length=length, sample=sample, examples=examples)
    for line in lines(found):
        print(line)
    if out:
        print(f"page: {out}")


def lines(report: Any) -> list[str]:
    """The report in words."""
    documents = sum(sum(by.values()) for by in report.samples.values())
    said = [f"{report.where}: {documents:,} documents, {report.bytes / 2**20:,.1f} MiB, digest {report.digest[:16]}"]
    for split, by in report.samples.items():
        said.append(f"  {split}: {sum(by.values()):,} ({', '.join(f'{source} {n:,}' for source, n in by.items())})")
    for modality, counts in report.modalities().items():
        seconds = f", {counts['seconds']:,.1f} s" if counts.get("seconds") else ""
        size = counts.get("bytes", 0) / 2**20
        said.append(f"  {modality:<8} {int(counts.get('segments', 0)):>9,} segments, {size:,.1f} MiB{seconds}")
    refused = sum(report.refused.values())
    why = f" ({', '.join(f'{n} {reason}' for reason, n in report.refused.items())})" if refused else ""
    said.append(f"  refused {refused:,}{why}; damaged {len(report.damaged):,}")
    said += [f"    {what}" for what in report.damaged]
    if report.tokens:
        t = report.tokens
        middle = t.lengths[len(t.lengths) // 2] if t.lengths else 0
        share = ", ".join(f"{m} {s:.1%}" for m, s in t.share.items())
        said.append(f"  tokens of {t.documents} documents: median {middle:,}, longest {max(t.lengths, default=0):,}; {share}")
        said.append(f"  rows of {t.row_length}: {t.row_waste:.1%} padding, {t.cut} documents cut")
    return said
