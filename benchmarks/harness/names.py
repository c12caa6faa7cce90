"""Names of tasks and variants as names of files."""

from __future__ import annotations

import hashlib
import re


def slug(name: str) -> str:
    """A file name for a task or a variant; different names never meet."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
