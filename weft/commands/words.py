"""Words on the line into values of the library, and its answers into words: what the commands of `use.py` share.

In: strings as typed. Out: segments, models, grids, spaces, lengths; a wrong one is a `UsageError` that shows how it is written.
Back: tables of choices and forecasts as text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weft.commands.arguments import UsageError


def read(prompt: Sequence[str], rate_hz: float | None, kind: str | None, what: str = "prompt") -> list[Any]:
    """Segments of the words on the line; `-` is what stands on standard input."""
    from weft.inference.files import read_prompt

    if not prompt:
        raise UsageError(f"the {what} is empty; give a text, or the name of a file")
    return read_prompt([sys.stdin.read() if word == "-" else word for word in prompt], rate_hz, kind or "default")


def open_model(checkpoint: str, device: str, dtype: str = "auto", quantize: str | None = None, compile: bool = False) -> Any:
    """A `Generalist`."""
    from weft.inference.load import load

    return load(checkpoint, device=device, dtype=dtype, quantize=quantize, compile=compile)


@contextmanager
def open_index(model: Any, place: str, make: bool = False) -> Iterator[Any]:
    """A search index in a file, or on a server as postgresql://user@host/database#name; a server's connection is given back."""
    if place.startswith(("postgresql://", "postgres://")):
        url, _, name = place.partition("#")
        if not name:
            raise UsageError(f"{place} names no index; write its name behind #, for example {place}#photos")
        with model.server_index(url, name, make=make) as index:
            yield index
        return
    yield model.index() if make and not Path(place).exists() else model.load_index(place)


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
