"""`attention()`: one signature, several backends, and an answer to why which one runs.

In: q [T H K], k and v [T G K] of packed tokens, a `StreamLayout`. Out: [T H K], and the log-sum-exp [T H] if asked for.
A backend is a module with two functions, imported when it is first asked:
    supports(q, k, v, layout, return_lse) -> None, or the reason why not
    run(q, k, v, layout, scale, return_lse) -> (out, lse or None)
and, if it can be a torch operator, a third one (`attention_operator.py`).
To add one, name its module in `BACKENDS` and its place in `ORDER`. The choice: the argument, else `use_backend(...)`, else the
environment variable WEFT_ATTENTION, else the first in `ORDER` that supports the call. A backend that was asked for by name and
cannot run is an error, never replaced in silence.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, overload

import torch
from torch import Tensor

from weft.kernels import attention_operator
from weft.kernels.attention_operator import AttentionError
from weft.kernels.layout import StreamLayout

BACKENDS = {
    "flex": "weft.kernels.flex",
    "xformers": "weft.kernels.xformers_backend",
    "triton": "weft.kernels.triton_attention",
    "cuda": "weft.kernels.cuda_attention",
    "hopper": "weft.kernels.hopper_attention",
    "sdpa": "weft.kernels.sdpa",
    "reference": "weft.kernels.reference",
}
ORDER = {"cpu": ("sdpa", "reference"), "cuda": ("flex", "xformers", "triton", "sdpa", "reference")}
VARIABLE = "WEFT_ATTENTION"

_log = logging.getLogger(__name__)
_chosen: ContextVar[str | None] = ContextVar("attention backend", default=None)
_said: set[tuple[str, str, torch.dtype]] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every `attention` call in this block on the named backend ("auto": choose)."""
    _known(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def why(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, *, return_lse: bool = False) -> list[tuple[str, str]]:
    """Each backend with "runs" or the reason why it does not, in the order in which "auto" asks them; others follow."""
    order = ORDER.get(q.device.type, ORDER["cuda"])
    names = [*order, *(name for name in BACKENDS if name not in order)]
    return [(name, _module(name).supports(q, k, v, layout, return_lse) or "runs") for name in names]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, *, scale: float | None = None, backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, *, scale: float | None = None, backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StreamLayout,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys that its layout lets it see.

    q [T H K]; k, v [T G K] with H a multiple of G. scale: factor of the scores, 1 / sqrt(K) by default.
    backend: a name of `BACKENDS` or "auto". return_lse: also the natural log-sum-exp of the scores [T H], without gradient.
    Under autocast float32 inputs are computed in the autocast dtype, as torch's own attention does.
    A torch.compile'd caller keeps one graph where a backend that is a torch operator was named, and on a CPU; flex, xformers,
    the reference and the choice among backends on a GPU break it here.

    Raises AttentionError for shapes that do not fit and for a named backend that does not support the call.
    """
    _check(q, k, v, layout)
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(lower) if x.dtype == torch.float32 else x for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wanted = backend or _chosen.get() or os.environ.get(VARIABLE) or "auto"
    _known(wanted)
    if torch.compiler.is_compiling():
        name = ORDER["cpu"][0] if wanted == "auto" and kind == "cpu" else wanted
        if attention_operator.has_operator(name, kind):
            out, lse = attention_operator.run(q, k, v, layout, scale, name)
            return (out, lse) if return_lse else out
        from weft.kernels import uncompiled

        return uncompiled.call(_eager, q, k, v, layout, scale, wanted, return_lse)  # type: ignore[no-any-return]
    return _eager(q, k, v, layout, scale, wanted, return_lse)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, scale: float, wanted: str, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    name, module = _select(q, k, v, layout, wanted, return_lse)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = module.run(q, k, v, layout, scale, return_lse)
    if not return_lse:
        return out
    assert lse is not None, f"backend {name} gave no log-sum-exp"
    return out, lse


def _select(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout, wanted: str, return_lse: bool) -> tuple[str, Any]:
    kind = q.device.type
    if wanted != "auto":
        module = _module(wanted)
        reason = module.supports(q, k, v, layout, return_lse)
        if reason:
            raise AttentionError(f"attention backend {wanted!r} was asked for but {reason}; use backend='auto' or see why()")
        return wanted, module
    for name in ORDER.get(kind, ORDER["cuda"]):
        module = _module(name)
        if module.supports(q, k, v, layout, return_lse) is None:
            if (name, kind, q.dtype) not in _said:
                _said.add((name, kind, q.dtype))
                _log.info("attention on %s in %s runs on backend %s", kind, q.dtype, name)
            return name, module
    raise AttentionError(f"no attention backend supports this call: {why(q, k, v, layout, return_lse=return_lse)}")


def _module(name: str) -> Any:
    return importlib.import_module(BACKENDS[name])


def _known(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise AttentionError(f"attention backend {name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")


def _shapes(q: Tensor, k: Tensor, v: Tensor, total: int) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, layout of {total} tokens"


def _check(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> None:
    total = layout.born.shape[0]  # not len(layout): to a compiler that is a constant, and every T another program
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[0] != total:
        raise AttentionError(
            f"attention needs q [T H K], k and v [T G K] and a layout of T tokens; found {_shapes(q, k, v, total)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise AttentionError(f"query heads must be a multiple of kv heads; found {_shapes(q, k, v, total)}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device == layout.device:
        kinds = ", ".join(f"{n} {x.dtype} on {x.device}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise AttentionError(f"q, k, v must have one dtype and lie on the layout's device {layout.device}; found {kinds}")
