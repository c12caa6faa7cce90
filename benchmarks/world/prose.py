"""Real English prose that ships with Python: the paragraphs of the topics behind `help()`, split by topic.

In: a seed. Out: paragraphs of about `SIZE` characters per split. Licence: Python Software Foundation License.
The text differs a little between Python versions; `digest` names the one in use.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from weft.benchmarks.world.splits import share

SIZE = 320
"""Characters of one document, cut at a sentence or word end."""
SHARES = {"test": 0.10, "val": 0.04}


def topics() -> dict[str, str]:
    """Topic -> its paragraphs of English, white space folded.

    Grammar rules, tables and code are left out; a paragraph that several topics share is kept in the first only, so that no
    test text has been read in another topic.
    """
    from pydoc_data.topics import topics as raw

    found, seen = {}, set()
    for name in sorted(raw):
        kept = []
        for paragraph in re.split(r"\n\s*\n", raw[name]):
            text = re.sub(r"\s+", " ", paragraph).strip()
            if text not in seen and is_prose(text):
                seen.add(text)
                kept.append(text)
        if kept:
            found[name] = " ".join(kept)
    return found


def is_prose(text: str) -> bool:
    """Whether a paragraph is mostly words: a sentence or more, nine characters in ten letters, spaces and plain stops."""
    return len(text) > 60 and sum(c.isalpha() or c in " ,.'" for c in text) >= 0.9 * len(text)


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
    """(topic, text) of every document per split."""
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
    return {part: pieces[: max(3, round(len(pieces) * share(part, scale)))] for part, pieces in split.items()}
