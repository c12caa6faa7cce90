"""`weft generate | predict | embed | search | explain`: a model on files and words.

A prompt is any number of words on the line: names of files are read by their suffix, anything else is text. A segment per word,
in that order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.commands.arguments import UsageError

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
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
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
        seed: of the draw.
        device: auto, cpu, cuda, cuda:1.
        dtype: auto, float32, bfloat16, float16.
        quantize: int8, or leave it out.
    """
    from weft.inference.files import save_reply

    items = read(prompt, rate_hz, kind)
    produced = [word.strip() for word in produce.split(",")]
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
        "seed": seed,
    }
    if any(word in RATED for word in produced):
        options["rate_hz"] = rate_hz
    if "sensor" in produced:
        options["kind"] = kind
    options = {name: value for name, value in options.items() if value is not None}
    model = open_model(checkpoint, device, dtype, quantize)
    known(model, items)
    wanted = produced[0] if len(produced) == 1 else produced
    if wanted == "text" and n == 1:
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
        index: search index to write, or to add to; `weft search` reads it.
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
        store = model.load_index(index) if Path(index).exists() else model.index()
        store.add(keys, vectors)
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
        index: index that `weft embed --index` wrote, or a folder of media, which is read now.
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
    if keys is None:
        store = model.load_index(index)
    else:
        store = model.index()
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


# -- words into values


def read(prompt: Sequence[str], rate_hz: float | None, kind: str | None, what: str = "prompt") -> list[Any]:
    """Segments of the words on the line; `-` is what stands on standard input."""
    from weft.inference.files import read_prompt

    if not prompt:
        raise UsageError(f"the {what} is empty; give a text, or the name of a file")
    return read_prompt([sys.stdin.read() if word == "-" else word for word in prompt], rate_hz, kind or "default")


def open_model(checkpoint: str, device: str, dtype: str = "auto", quantize: str | None = None) -> Any:
    """A `Generalist`."""
    from weft.inference.load import load

    return load(checkpoint, device=device, dtype=dtype, quantize=quantize)


def known(model: Any, items: Sequence[Any]) -> Sequence[Any]:
    """The items; a table of readings needs to say which fitted scaling it is."""
    kinds = sorted(getattr(model.tokenizer.tokenizers.get("sensor"), "kinds", ()))
    for item in items:
        found = getattr(item, "kind", None)
        if kinds and found is not None and found not in kinds:
            raise UsageError(
                f"{item.name or 'the sensor'}: this model has no sensor kind {found!r}; say one of {kinds} with --kind"
            )
    return items


def words(text: str) -> list[str]:
    """A JSON list, or words with commas between."""
    if text.lstrip().startswith("["):
        try:
            return [str(word) for word in json.loads(text)]
        except ValueError as error:
            raise UsageError(f'--choices {text!r} is no JSON list ({error}); write \'["yes", "no"]\' or yes,no') from error
    return [word.strip() for word in text.split(",") if word.strip()]


def shape(text: str | None) -> tuple[int, ...] | None:
    """(h, w) from 4x6."""
    if text is None:
        return None
    parts = text.lower().strip("[]() ").replace(",", "x").split("x")
    if not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--grid {text!r} must be patches as HxW, for example 4x6, or FRAMESxHxW for a video")
    return tuple(int(part) for part in parts)


def length(text: str | None) -> int | float:
    """Readings as int, seconds (`0.5s`) as float."""
    try:
        return float(text[:-1]) if text and text.endswith("s") else int(text or 1)
    except ValueError:
        raise UsageError(f"--horizon {text!r} must be readings such as 20, or seconds such as 0.5s") from None


def action_space(text: str | None) -> Any:
    """An `ActionSpace` from a count or a JSON object."""
    from weft.tokenizers.segment import ActionSpace

    if text is None:
        return None
    try:
        value: Any = json.loads(text)
        return (
            ActionSpace(n=value) if isinstance(value, int) else ActionSpace(low=tuple(value["low"]), high=tuple(value["high"]))
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f'{text!r} is no action space ({error}); write a number of choices, or \'{{"low": [-1], "high": [1]}}\''
        ) from error


def media(files: Sequence[str]) -> list[str]:
    """Files and texts, with folders replaced by the media in them, sorted."""
    from weft.inference.files import MEDIA

    if not files:
        raise UsageError("there is nothing to embed; give files, texts or folders")
    found: list[str] = []
    for name in files:
        if len(name) < 256 and Path(name).is_dir():
            inside = sorted(str(p) for p in Path(name).rglob("*") if p.is_file() and p.suffix.lower() in MEDIA)
            if not inside:
                raise UsageError(f"the folder {name} holds no media ({' '.join(MEDIA)})")
            found += inside
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def vectors_of(model: Any, keys: Sequence[str], rate_hz: float | None, kind: str | None) -> Any:
    """float32 [n E]: one vector per key."""
    return model.embed([known(model, read([key], rate_hz, kind)) for key in keys])


def free_stem(folder: Path) -> str:
    """`reply`, or `reply2`, ...: nothing that was saved before is written over."""
    number = 1
    while any(folder.glob(f"{(stem := 'reply' if number == 1 else f'reply{number}')}-*")):
        number += 1
    return stem


# -- answers into words


def show_choice(choice: Any) -> None:
    """Every choice, the likeliest first."""
    order = sorted(range(len(choice.choices)), key=lambda i: -choice.probabilities[i])
    width = max(len(str(c)) for c in choice.choices)
    print(f"{'':{width}}  probability  per token")
    for i in order:
        print(f"{choice.choices[i]!s:{width}}  {choice.probabilities[i]:11.3f}  {choice.normalized[i]:9.3f}")


def show_forecast(forecast: Any, out: str | None) -> None:
    """Median and the 5 % and 95 % quantiles of every reading, as a table and perhaps as a file."""
    import numpy as np

    count = forecast.median.shape[1]
    names = forecast.channels or tuple(f"channel {c}" for c in range(count))
    units = forecast.units or ("",) * count
    heads = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, units)]
    low, high = forecast.quantiles[0.05], forecast.quantiles[0.95]
    print("reading  " + "  ".join(f"{head:>30}" for head in heads))
    for i, row in enumerate(forecast.median):
        cells = (f"{row[c]:.4g} ({low[i, c]:.4g} to {high[i, c]:.4g})" for c in range(count))
        print(f"{i + 1:7d}  " + "  ".join(f"{cell:>30}" for cell in cells))
    print(f"median and 5 % to 95 % of {len(forecast.values)} sampled continuations")
    if out is not None:
        columns = np.concatenate([forecast.median, low, high], axis=1)
        header = ",".join(f"{head} {what}" for what in ("median", "5 %", "95 %") for head in heads)
        np.savetxt(out, columns, delimiter=",", header=header, comments="", fmt="%.9g")
        print(f"table: {out}")
