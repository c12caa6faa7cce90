"""A session on disk: everything that decides what it does next, in one safetensors file.

In: a `Session`. Out: a file with its caches, what was pushed and not read yet, and as JSON the spec, the positions and what is
known of the last segments. Back: a session that goes on bit for bit. Nothing is pickled; the file appears by one rename. A file
of another model or tokenizer is refused, since its keys and values would mean nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.inference.errors import SessionFileError
from weft.inference.feed import ROW, Part
from weft.inference.publish import publish
from weft.inference.sampling import Sampling
from weft.model.media import Media
from weft.tokenizers.positions import Placer
from weft.tokenizers.segment import ActionSpace
from weft.tokenizers.stream import SegmentInfo

FORMAT = "weft.session.1"
STORES = ("local", "full")


@dataclass(frozen=True)
class Saved:
    """What a file holds."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def spec(self) -> dict[str, Any]:
        """The fields of the `SessionSpec` that it was saved with; its prompt is part of the stream already."""
        stated = self.facts["spec"]
        return stated | {"space": _read_space(stated["space"]), "sampling": Sampling(**stated["sampling"])}


def save_session(session: Any, path: str | Path) -> None:
    """Write the session as it stands; it goes on unchanged."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name in STORES:
        store = getattr(session.cache, name)
        tensors[f"{name}.data"] = store.data[:, :, :, : store.used].contiguous().cpu()
    if session.hidden is not None:
        tensors["hidden"] = session.hidden.detach().clone().contiguous().cpu()
    for i, part in enumerate(session.writer.pending):
        tensors |= {f"pending.{i}.{name}": _tensor(getattr(part, name)) for name in ROW}
        for name, rows in part.features.items():
            tensors[f"pending.{i}.features.{name}"] = _tensor(rows)
            tensors[f"pending.{i}.feature_at.{name}"] = _tensor(part.feature_at[name])
    tensors["facts"] = _tensor(np.frombuffer(json.dumps(_facts(session), default=_plain).encode(), np.uint8))
    publish(path, save(tensors, metadata={"format": FORMAT}))


def read_session(path: str | Path) -> Saved:
    """What `save_session` wrote. Raises `SessionFileError` for anything else."""
    from safetensors.torch import load

    try:
        tensors = load(Path(path).read_bytes())
        saved = Saved(Path(path), json.loads(tensors.pop("facts").numpy().tobytes()), tensors)
        if saved.facts["format"] != FORMAT:
            raise ValueError(f"its format is {saved.facts['format']!r}, this version reads {FORMAT!r}")
        assert saved.spec is not None
        return saved
    except FileNotFoundError:
        raise SessionFileError(f"no session at {path}; write one with session.save") from None
    except Exception as error:
        raise SessionFileError(f"{path} is not a whole weft session ({error}); save the session again") from error


def fill_session(blank: Any, saved: Saved) -> None:
    """Bring `blank`, a new session with the saved spec, to the saved moment. Raises `SessionFileError` for another model."""
    for what, digest in _identity(blank).items():
        if (found := saved.facts.get(what)) != digest:
            raise SessionFileError(
                f"{saved.path} was saved with another {what} ({str(found)[:16]!r}, here {digest[:16]!r}); "
                "load the one it was saved with"
            )
    try:
        _fill(blank, saved.facts, saved.tensors)
    except Exception as error:
        raise SessionFileError(f"{saved.path} is not a whole weft session ({error}); save the session again") from error


def _identity(session: Any) -> dict[str, str]:
    return {"model": session.digest, "tokenizer": session.tokenizer.digest()}


# -- out


def _facts(session: Any) -> dict[str, Any]:
    builder, spec = session.writer.builder, session.spec
    placer = vars(builder.placer) | {"counts": [[*key, *value] for key, value in builder.placer.counts.items()]}
    return {
        "format": FORMAT,
        **_identity(session),
        "spec": {
            "space": _space(spec.space),
            "rate_hz": spec.rate_hz,
            "full_tokens": spec.full_tokens,
            "landmarks": spec.landmarks,
            "sampling": asdict(spec.sampling),
        },
        "stores": {name: _store(getattr(session.cache, name)) for name in STORES},
        "open_block": session.cache.open_block,
        "media": vars(session.cache.media) if session.cache.media else None,
        "placer": placer,
        "info": [_info(info) for info in builder.info],
        "blocks": builder.blocks,
        "clock_start": builder.clock_start,
        "stamped": builder._stamped,
        "pending": len(session.writer.pending),
        "questions": session.questions,
        "now": session.now,
    }


def _store(store: Any) -> dict[str, Any]:
    return {"length": store.length, "landmarks": list(store.landmarks), "kept": list(store.kept)}


def _info(info: SegmentInfo) -> dict[str, Any]:
    fields = {name: _space(value) if name == "space" else value for name, value in info.fields.items()}
    medium = None if info.medium is None else _info(info.medium)
    return vars(info) | {"grid": list(info.grid), "times": info.times.tolist(), "fields": fields, "medium": medium}


def _space(space: Any) -> dict[str, Any] | None:
    return None if space is None else asdict(space)


def _plain(value: Any) -> Any:
    """numpy's numbers as JSON's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be saved with a session")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).copy())


# -- back


def _fill(blank: Any, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    cache, builder = blank.cache, blank.writer.builder
    for name in STORES:
        store, stated, data = getattr(cache, name), facts["stores"][name], tensors[f"{name}.data"]
        store.length, store.landmarks, store.kept = stated["length"], stated["landmarks"], stated["kept"]
        shape = (*store.data.shape[:3], store.used, store.data.shape[4])
        if data.shape != shape or data.dtype != store.data.dtype:
            raise ValueError(
                f"{name} keys are {data.dtype} {list(data.shape)}, the model needs {store.data.dtype} {list(shape)}"
            )
        store.data = data.to(store.data.device)
    cache.open_block = facts["open_block"]
    if cache.media:
        cache.media = Media(**{name: _tupled(value) for name, value in facts["media"].items()})
    counts = {(name, key): tuple(rest) for name, key, *rest in facts["placer"]["counts"]}
    builder.placer = Placer(**facts["placer"] | {"counts": counts})
    builder.info = tuple(map(_read_info, facts["info"]))
    builder.blocks, builder.clock_start, builder._stamped = facts["blocks"], facts["clock_start"], facts["stamped"]
    blank.writer.pending = [_part(tensors, i) for i in range(facts["pending"])]
    hidden = tensors.get("hidden")
    blank.hidden = None if hidden is None else hidden.to(blank.model.device)
    blank.questions, blank.now = facts["questions"], facts["now"]


def _part(tensors: dict[str, Tensor], i: int) -> Part:
    rows = {name: tensors[f"pending.{i}.{name}"].numpy() for name in ROW}
    features, feature_at = (
        {key.removeprefix(start): value.numpy() for key, value in tensors.items() if key.startswith(start)}
        for start in (f"pending.{i}.features.", f"pending.{i}.feature_at.")
    )
    return Part(**rows, features=features, feature_at=feature_at)


def _read_info(stated: dict[str, Any]) -> SegmentInfo:
    fields = {name: _tupled(value) for name, value in stated["fields"].items() if name != "space"}
    if "space" in stated["fields"]:
        fields["space"] = _read_space(stated["fields"]["space"])
    medium = stated.get("medium") and _read_info(stated["medium"])
    shape = {"grid": tuple(stated["grid"]), "times": np.array(stated["times"], np.int64)}
    return SegmentInfo(**stated | shape | {"fields": fields, "medium": medium})


def _read_space(stated: dict[str, Any] | None) -> ActionSpace | None:
    if stated is None:
        return None
    return ActionSpace(stated["n"], _tupled(stated["low"]), _tupled(stated["high"]))


def _tupled(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(value) if isinstance(value, list) else value
