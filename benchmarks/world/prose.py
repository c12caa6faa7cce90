"""Real English prose that ships with Python: the language reference topics behind `help()`, split by topic.

In: a seed. Out: paragraphs of about `SIZE` characters per split. Licence: Python Software Foundation License.
The text differs a little between Python versions; `digest` names the one in use.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

SIZE = 320
"""Characters of one document, cut at a sentence or word end."""
SHARES = {"test": 0.10, "val": 0.04}


def topics() -> dict[str, str]:
    """Topic -> text, white space folded. A text that several topics share is kept once."""
    from pydoc_data.topics import topics as raw

    found, seen = {}, set()
    for name in sorted(raw):
        text = re.sub(r"\s+", " ", re.sub(r"[*=~^\"-]{3,}", " ", raw[name])).strip()
        if text not in seen and len(text) > 200:
            found[name] = text
            seen.add(text)
    return found


def digest() -> str:
    """SHA-256 of the source text."""
    return hashlib.sha256("\n".join(topics().values()).encode()).hexdigest()


def cut(text: str, size: int = SIZE) -> list[str]:
    """Split at the last sentence end (or space) before `size` characters; joined again by spaces it is the text."""
    parts = []
    while len(text) > size:
        end = text.rfind(". ", size // 2, size) + 1 or text.rfind(" ", 1, size + 1)
        end = end if end > 0 else size
        parts.append(text[:end].strip())
        text = text[end:].strip()
    return [*parts, text] if text else parts


def prose(seed: int, scale: float = 1.0) -> dict[str, list[tuple[str, str]]]:
    """(topic, text) of every document per split. A test text that also stands in a training topic is left out."""
    texts = topics()
    draw = np.random.default_rng([seed, 5])
    names = [sorted(texts)[i] for i in draw.permutation(len(texts))]
    total = sum(len(t) for t in texts.values())
    split: dict[str, list[tuple[str, str]]] = {"test": [], "val": [], "train": []}
    used = 0
    for name in names:
        part = "test" if used < SHARES["test"] * total else "val" if used < sum(SHARES.values()) * total else "train"
        used += len(texts[name])
        split[part] += [(name, piece) for piece in cut(texts[name])]
    known = {text for _, text in split["train"]}
    for part in ("test", "val"):
        split[part] = [(name, text) for name, text in split[part] if text not in known]
    return {part: pieces[: max(3, round(len(pieces) * scale))] for part, pieces in split.items()}
