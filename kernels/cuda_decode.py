"""One decode step over a paged cache: QK-norm, rotation, the write of key and value, and attention, in one kernel per layer.

In: q [B H K], k and v [B G K] of one new token per row, as they leave the projection, and a `Step` that all layers share.
Out: [B H K]; the cache holds the new token afterwards, and `advance` counts it once all layers have run. Two implementations
with the same arguments: "cuda" (`csrc/decode.cuh`: nothing allocated, nothing read on the host, so a CUDA graph can replay it)
and "torch" (plain, on any device, also without host reads). `auto` is torch: the kernel has not been timed on a GPU yet.
WEFT_DECODE=cuda, `CHOICE.use("cuda")` or `implementation="cuda"` asks for it.

Axes: `B rows of a step  H heads  G kv heads  R = H / G  K head width  S slots of a row`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.choice import Choice, ChoiceError
from weft.kernels.cuda_library import missing
from weft.kernels.elementwise import rms_norm
from weft.kernels.paged import PagedCache, PagedKeys
from weft.kernels.rotary import axis_of_pair, default_split, rotate

CHOICE = Choice("WEFT_DECODE", ("torch", "cuda"), auto="torch")
WIDTHS, TYPES, MOST_FOLDED = (64, 128), (torch.bfloat16, torch.float16), 8
MOST_PARTS, FEWEST_KEYS = 64, 64  # of csrc/decode.cuh
BLOCKS_PER_PROCESSOR = 2  # not measured


@dataclass
class Step:
    """What the layers share. For a CUDA graph write the next rows, landmarks and positions into these tensors in place."""

    rows: Tensor  # int32 [B]: row of the cache, -1 for nobody; no row twice
    landmark: Tensor  # uint8 [B]: is the new token a landmark
    position: Tensor  # int64 [B 3]
    turns: Tensor  # float64 [K/2]: turns per position of each pair
    axis: Tensor  # int32 [K/2]: which of the three positions turns it
    partial: Tensor  # float32: sums of the parts, scratch
    arrived: Tensor  # int32 [B G], zero between launches
    parts: int  # blocks per row and kv head, at most


def new_step(
    cache: PagedCache,
    batch: int,
    heads: int,
    *,
    theta: float = 10_000.0,
    split: tuple[int, int, int] | None = None,
    parts: int | None = None,
) -> Step:
    """Tensors for steps of `batch` rows, all nobody's at first. theta, split: as in `rotary.rope_table`; parts: into how many
    blocks a row's keys are cut (None: as many as fill the GPU; a row with few keys takes fewer)."""
    device, width = cache.state.device, cache.head_width
    if parts is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        parts = -(-BLOCKS_PER_PROCESSOR * processors // (batch * cache.kv_heads))
    parts = max(1, min(parts, MOST_PARTS))
    folded = _folded(heads // cache.kv_heads)
    speed = [theta ** (-2 * pair / width) / (2 * math.pi) for pair in range(width // 2)]
    return Step(
        torch.full((batch,), -1, dtype=torch.int32, device=device),
        torch.zeros(batch, dtype=torch.uint8, device=device),
        torch.zeros((batch, 3), dtype=torch.int64, device=device),
        torch.tensor(speed, dtype=torch.float64, device=device),
        torch.tensor(axis_of_pair(split or default_split(width)), dtype=torch.int32, device=device),
        torch.zeros(batch * cache.kv_heads * parts * folded * (width + 2), device=device),
        torch.zeros(batch * cache.kv_heads, dtype=torch.int32, device=device),
        parts,
    )


def supports(q: Tensor, k: Tensor, keys: PagedKeys) -> str | None:
    """None if the CUDA kernel can serve q [B H K] and k [B G K], else the reason."""
    if q.device.type != "cuda":
        return f"needs an NVIDIA GPU, found {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0"
    if q.dtype not in TYPES or q.dtype != keys.pool.dtype:
        return f"computes in bfloat16 or float16, as the cache is; found {q.dtype} and {keys.pool.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"needs a head width of 64 or 128, found {q.shape[-1]}"
    if q.shape[1] > MOST_FOLDED * k.shape[1]:
        return f"serves at most {MOST_FOLDED} query heads per kv head, found {q.shape[1]} for {k.shape[1]}"
    return missing()


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    step: Step,
    keys: PagedKeys,
    layer: int,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of one new token per row of the step, whose key and value enter `keys` -> out [B H K].

    q [B H K], k and v [B G K]: before norm and rotation. q_weight, k_weight [K]: float32 ones are used as they are. layer:
    place among the layers of `keys`. scale: 1 / sqrt(K) by default. A row that is nobody's gives zeros. No gradient.
    Raises ChoiceError where the implementation asked for by name cannot run.
    """
    name = CHOICE.pick(implementation)
    reason = supports(q, k, keys) if name == "cuda" else None
    if reason:
        raise ChoiceError(f"the CUDA decode kernel was asked for but {reason}; leave the choice to auto")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v.to(k.dtype)))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    weights = [w.float().contiguous() for w in (q_weight, k_weight)] if q.dtype != torch.float64 else [q_weight, k_weight]
    parts = min(step.parts, -(-keys.table.shape[1] * keys.page // FEWEST_KEYS))
    tensors = (step.position, step.turns, step.axis, step.rows, step.landmark, keys.state, keys.marked, keys.table)
    numbers = (keys.window, keys.max_landmarks, keys.store, parts, q.shape[-1] ** -0.5 if scale is None else scale, eps)
    call = torch.ops.weft_cuda.decode_step if name == "cuda" else decode_step
    call(q, k, v, *weights, *tensors, keys.pool[layer], out, step.partial, step.arrived, *numbers)
    return out


def advance(step: Step, cache: PagedCache, implementation: str | None = None) -> None:
    """Count the step's tokens, after its last layer."""
    cuda = CHOICE.pick(implementation) == "cuda" and step.rows.device.type == "cuda" and missing() is None
    call = torch.ops.weft_cuda.decode_advance if cuda else decode_advance
    call(step.rows, step.landmark, cache.state, cache.marked)


@torch.library.custom_op("weft::decode_step", mutates_args=("state", "pool", "out", "partial", "arrived"))
def decode_step(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, position: Tensor, turns: Tensor, axis: Tensor,
    rows: Tensor, landmark: Tensor, state: Tensor, marked: Tensor, table: Tensor, pool: Tensor, out: Tensor, partial: Tensor,
    arrived: Tensor, window: int, max_landmarks: int, store: int, parts: int, scale: float, eps: float,
) -> None:  # fmt: skip
    """The step in plain torch, with the operator's arguments; see csrc/decode.cuh. `partial` and `arrived` are left alone."""
    live = rows >= 0
    row = torch.where(live, rows, len(state) - 1).long()
    length, landmarks, left = state[row, :3].long().unbind(1)
    landmarks = landmarks + landmark
    taken = length % window
    goes = (length >= window) & (marked[row, taken % marked.shape[1]] > 0)  # a landmark gives its slot to the new token
    moves = goes & (landmarks - max_landmarks <= left)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    angle = position.double()[:, axis] * turns * (2 * math.pi)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    query, key = (rotate(rms_norm(x.to(wide), w, eps), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))
    page, place = _page(table, row, taken, pool), taken % pool.shape[3]
    kept = store + left % max(max_landmarks, 1)
    target = torch.where(moves, _page(table, row, kept, pool), 0)
    pool[target, :, :, kept % pool.shape[3]] = pool[page, :, :, place]
    pool[page, :, :, place] = torch.stack([key.to(pool.dtype), v], 1)
    lost = (live & ((page == 0) | (moves & (target == 0)))).int()
    state[:, 3].scatter_reduce_(0, row, lost, "amax")

    left = left + goes
    low = torch.minimum((landmarks - max_landmarks).clamp(min=0), left)
    slot = torch.arange(table.shape[1] * pool.shape[3], device=q.device)
    in_ring = slot < (length + 1).clamp(max=window)[:, None]
    beside = slot - store
    in_store = (
        (beside >= 0) & (beside < max_landmarks) & ((beside - low[:, None]) % max(max_landmarks, 1) < (left - low)[:, None])
    )
    pages = table[row].long()
    alive = (in_ring | in_store) & (pages > 0).repeat_interleave(pool.shape[3], 1)
    alive[:, 0] |= ~live  # some key for rows that are nobody's; their result is dropped
    both = pool[pages].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).to(wide)  # [2 B G S K]
    keys, values = torch.where(alive[:, None, :, None], both, 0).unbind(0)
    query = query.unflatten(1, (keys.shape[1], -1))
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=alive[:, None, None], scale=scale)
    out.copy_(torch.where(live[:, None, None], mixed.flatten(1, 2), 0))


@decode_step.register_fake
def _(*args: object) -> None:
    return None


@torch.library.custom_op("weft::decode_advance", mutates_args=("state", "marked"))
def decode_advance(rows: Tensor, landmark: Tensor, state: Tensor, marked: Tensor) -> None:
    """Count one token of each row, in plain torch."""
    row = torch.where(rows >= 0, rows, len(state) - 1).long()
    length = state[row, 0].long()
    slot = length % marked.shape[1]
    left = ((length >= marked.shape[1]) & (marked[row, slot] > 0)).int()
    marked[row, slot] = (landmark > 0).to(marked.dtype)
    change = torch.stack([torch.ones_like(left), (landmark > 0).int(), left, torch.zeros_like(left)], 1)
    state.index_add_(0, row, change * (rows >= 0)[:, None].int())


@decode_advance.register_fake
def _(rows: Tensor, landmark: Tensor, state: Tensor, marked: Tensor) -> None:
    return None


def _page(table: Tensor, row: Tensor, slot: Tensor, pool: Tensor) -> Tensor:
    """Page of a slot of each row, 0 beyond the table."""
    at = slot // pool.shape[3]
    return torch.where(at < table.shape[1], table[row, at.clamp(max=table.shape[1] - 1)], 0).long()


def _folded(heads: int) -> int:
    """Query heads per kv head as the kernel counts them."""
    return 8 if heads > 4 else 4 if heads > 2 else 2
