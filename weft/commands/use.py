"""`weft generate | predict | embed | search | explain`: a model on files and words.

A prompt is any number of words on the line: names of files are read by their suffix, anything else is text. A segment per word,
in that order.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from weft.commands.arguments import UsageError
from weft.commands.words import (
    action_space,
    free_stem,
    known,
    length,
    media,
    open_index,
    open_model,
    read,
    shape,
    show_choice,
    show_forecast,
    vectors_of,
    words,
)

RATED = ("video", "sensor", "action")
"""What is produced at a rate."""


def generate(
    checkpoint: str,
    *prompt: str,
    produce: str = "text",
    out: str = "replies",
    n: int = 1,
    max_tokens: int | None = None,
    grid: str | None = None,
    seconds: float | None = None,
    readings: int | None = None,
    space: str | None = None,
    rate_hz: float | None = None,
    kind: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    guidance: float = 1.0,
    stop: str | None = None,
    edit: str | None = None,
    keep: float | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
) -> None:
    """Continue a prompt. Text is printed; everything else is saved, and the names of the files are printed.

    Args:
        checkpoint: checkpoint folder, run folder, or hub id owner/name.
        prompt: texts and files (.png .jpg .wav .flac .mp4 .txt .csv .npy, a folder of frames, a document .json).
        produce: text, image, video, audio, sensor, action, several of them with commas between, or any.
        out: folder for what is not text.
        n: replies.
        max_tokens: tokens of each produced segment at most.
        grid: patches of an image as HxW, of a video as FRAMESxHxW.
        seconds: length of a sound.
        readings: readings of a sensor, or steps of actions.
        space: legal actions: a number of choices, or '{"low": [-1], "high": [1]}'.
        rate_hz: readings, steps or frames per second: of .csv, .npy and folders in the prompt, and of what is produced.
        kind: fitted scaling of the sensor.
        temperature: 0 = the most likely token; left out, 0 for text and actions, 1 for media.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of tokens with this probability.
        min_p: keep tokens at least this fraction as likely as the most likely.
        repetition_penalty: weaken text that was said before; 1 = off.
        guidance: classifier-free guidance for media; 1 = off.
        stop: end a text before this string.
        edit: picture or sound of which a part stays and the rest is produced anew; takes the place of --produce.
        keep: share of --edit that stays, from 0 to 1, counted from its top or its beginning.
        seed: of the draw.
        device: auto, cpu, cuda, cuda:1.
        dtype: auto, float32, bfloat16, float16.
        quantize: int8 or int4 weights, or leave it out.
        compile: compile the decoding step first; pays off for many or long replies.
    """
    from weft.inference.files import save_reply

    items = read(prompt, rate_hz, kind)
    if (edit is None) != (keep is None):
        raise UsageError("--edit names a picture or a sound and --keep how much of it stays; give both or neither")
    edited = read([edit], rate_hz, kind, what="edit") if edit is not None else []
    produced = [edited[0].modality] if edited else [word.strip() for word in produce.split(",")]
    options = {
        "max_tokens": max_tokens,
        "grid": shape(grid),
        "seconds": seconds,
        "readings": readings,
        "space": action_space(space),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "guidance": guidance,
        "stop": stop,
        "keep": keep,
        "seed": seed,
    }
    if any(word in RATED for word in produced):
        options["rate_hz"] = rate_hz
    if "sensor" in produced:
        options["kind"] = kind
    options = {name: value for name, value in options.items() if value is not None}
    model = open_model(checkpoint, device, dtype, quantize, compile)
    known(model, items)
    wanted: Any = edited[0] if edited else produced[0] if len(produced) == 1 else produced
    if isinstance(wanted, str) and wanted == "text" and n == 1:
        for piece in model.generate(items, "text", stream=True, **options):
            print(piece.content, end="", flush=True)
        print()
        return
    replies = model.generate(items, wanted, n=n, **options)
    for reply in [replies] if n == 1 else replies:
        if reply.text:
            print(reply.text)
        if any(segment.modality != "text" for segment in reply.segments):
            for path in save_reply(reply, out, stem=free_stem(Path(out))):
                print(path)
        if reply.finish == "max_tokens":
            print("(ended by --max-tokens before the model ended it)", file=sys.stderr)


def predict(
    checkpoint: str,
    *prompt: str,
    choices: str | None = None,
    horizon: str | None = None,
    action: str | None = None,
    samples: int = 16,
    rate_hz: float | None = None,
    kind: str | None = None,
    out: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Answer one of three questions about a prompt: which choice, how a sensor goes on, or what to do next.

    Args:
        checkpoint: checkpoint folder, run folder, or hub id owner/name.
        prompt: texts and files, one segment each.
        choices: answers with commas between, or a JSON list; the likeliest comes first.
        horizon: readings to forecast, or seconds with an s behind, for example 20 or 0.5s.
        action: legal actions: a number of choices, or '{"low": [-1], "high": [1]}'.
        samples: continuations that a forecast is made of.
        rate_hz: readings per second of .csv and .npy files.
        kind: fitted scaling of the sensor.
        out: file for the forecast as .csv.
        seed: of the draw.
        device: auto, cpu, cuda, cuda:1.
    """
    asked = [name for name, value in (("choices", choices), ("horizon", horizon), ("action", action)) if value is not None]
    if len(asked) != 1:
        raise UsageError(f"give exactly one of --choices, --horizon and --action, got {' and '.join(asked) or 'none'}")
    items = read(prompt, rate_hz, kind)
    answers, ahead, space = words(choices or ""), length(horizon), action_space(action)
    model = open_model(checkpoint, device)
    known(model, items)
    if choices is not None:
        show_choice(model.predict(items, choices=answers))
    elif action is not None:
        print(json.dumps(model.predict(items, action=space, seed=seed).tolist()))
    else:
        forecast = model.predict(items, horizon=ahead, samples=samples, sensor=kind, rate_hz=rate_hz, seed=seed)
        show_forecast(forecast, out)


def embed(
    checkpoint: str,
    *files: str,
    index: str | None = None,
    out: str | None = None,
    rate_hz: float | None = None,
    kind: str | None = None,
    device: str = "auto",
) -> None:
    """Vectors of files, one each; the meaning of a file is a unit vector of any modality.

    Args:
        checkpoint: checkpoint folder, run folder, or hub id owner/name.
        files: files, texts, and folders (every medium in them).
        index: search index to write, or to add to: a file, or postgresql://user@host/database#name; `weft search` reads it.
        out: .npy file for the vectors, with the keys beside it as .json.
        rate_hz: readings per second of .csv and .npy files.
        kind: fitted scaling of their sensors.
        device: auto, cpu, cuda, cuda:1.
    """
    import numpy as np

    if index is None and out is None:
        raise UsageError("say where the vectors go: --index my.index to search them, or --out vectors.npy")
    if out is not None and Path(out).suffix != ".npy":
        raise UsageError(f"--out {out} must end in .npy")
    keys = media(files)
    model = open_model(checkpoint, device)
    vectors = vectors_of(model, keys, rate_hz, kind)
    if index is not None:
        with open_index(model, index, make=True) as store:
            store.add(keys, vectors)
            if "://" not in index:
                store.save(index)
            print(f"{index}: {len(keys)} added, {len(store)} in it")
    if out is not None:
        np.save(out, vectors)
        Path(out).with_suffix(".json").write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
        print(f"{out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers; keys in {Path(out).with_suffix('.json')}")


def search(
    checkpoint: str,
    index: str,
    *query: str,
    k: int = 10,
    save: str | None = None,
    rate_hz: float | None = None,
    kind: str | None = None,
    device: str = "auto",
) -> None:
    """Find what is nearest to a query of any modality.

    Args:
        checkpoint: checkpoint folder, run folder, or hub id owner/name.
        index: index that `weft embed --index` wrote (file or server), or a folder of media, which is read now.
        query: texts and files that make one query.
        k: hits.
        save: keep the index of a folder of media in this file.
        rate_hz: readings per second of .csv and .npy files.
        kind: fitted scaling of their sensors.
        device: auto, cpu, cuda, cuda:1.
    """
    items = read(query, rate_hz, kind, what="query")
    keys = media([index]) if Path(index).is_dir() else None
    model = open_model(checkpoint, device)
    known(model, items)
    with open_index(model, index) if keys is None else nullcontext(model.index()) as store:
        if keys is not None:
            store.add(keys, vectors_of(model, keys, rate_hz, kind))
            if save is not None:
                store.save(save)
        for hit in store.search(model.embed([items]), k)[0]:
            print(f"{hit.score:+.3f}  {hit.key}")


def explain(
    checkpoint: str,
    *prompt: str,
    reply: str | None = None,
    out: str = "why.html",
    max_tokens: int = 32,
    rate_hz: float | None = None,
    kind: str | None = None,
    device: str = "auto",
) -> None:
    """Say which segments of a prompt mattered for a reply, and write a page.

    Args:
        checkpoint: checkpoint folder, run folder, or hub id owner/name.
        prompt: texts and files, one segment each.
        reply: text or file to explain; left out, the model's own text.
        out: page to write; the numbers go beside it as .json.
        max_tokens: tokens of the model's own reply at most.
        rate_hz: readings per second of .csv and .npy files.
        kind: fitted scaling of the sensor.
        device: auto, cpu, cuda, cuda:1.
    """
    items = read(prompt, rate_hz, kind)
    given = read([reply], rate_hz, kind, what="reply") if reply is not None else None
    model = open_model(checkpoint, device)
    known(model, items)
    answer: Any = given
    if given is None:
        answer = model.generate(items, max_tokens=max_tokens)
        print(f"reply: {answer.text}")
    why = model.explain(items, answer)
    print(f"log-probability of the reply {why.logprob:.2f} nats; without a segment it is less likely by, and its sensitivity:")
    for part in why.parts:
        if part.role == "prompt":
            gone = f"{part.leave_one_out:+8.2f} nats" if part.leave_one_out is not None else "       - nats"
            print(f"  {gone}  {part.gradient or 0:5.0%}  {part.modality:<7} {part.label}")
    page, numbers = why.save(out)
    print(f"page: {page}, numbers: {numbers}")
