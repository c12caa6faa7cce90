"""Other models through the same tasks: any transformers causal or vision-language model, and scikit-learn specialists.

In: `hf:FOLDER`, `sklearn:svm`, or a weft checkpoint. Out: an object with the methods of `Generalist` that a task calls
(`generate` for text, `predict` for choices, `score`), and `unable(task)`, which says why a task is not for it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from weft.benchmarks.harness.specialist import Specialist
from weft.benchmarks.harness.task import TaskError
from weft.benchmarks.harness.transformers_model import TransformersModel


def open_model(name: str, device: str = "auto", taken: Container[str] = ()) -> tuple[str, Any]:
    """A label that is not `taken`, and the model or rival behind a name of `weft eval`."""
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        model: Any = TransformersModel(rest, device)
    elif kind == "sklearn":
        model = Specialist(rest or "svm")
    elif rest and not Path(name).exists():
        raise TaskError(
            f"{name!r} is no folder and {kind!r} is no kind of rival; use hf:FOLDER, sklearn:svm, or a checkpoint folder"
        )
    else:
        from weft.inference.load import load

        model = load(name, device=device)
    label = base = re.sub(
        r"[^A-Za-z0-9._-]+", "-", "-".join(Path(rest or name).parts[-2:]) if not rest else f"{kind}-{Path(rest).name}"
    ).strip("-.")
    count = 1
    while label in taken:
        count += 1
        label = f"{base}-{count}"
    return label, model


__all__ = ["Specialist", "TransformersModel", "open_model"]
