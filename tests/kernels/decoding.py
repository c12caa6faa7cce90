"""Documents that are decoded step by step over a paged cache, and what each step should give, from first principles."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels import cuda
from weft.kernels.cuda_decode import Step, decode_advance, decode_attention, new_step
from weft.kernels.layout import StreamLayout
from weft.kernels.paged import PagedCache, PagedKeys
from weft.kernels.rotary import qk_norm_rope, rope_table

EPS = 1e-6
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """Shapes of one run. lengths: tokens of each row before the first step; None is a place of the step that is nobody's."""

    lengths: tuple[int | None, ...]
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    window: int | None = 37
    max_landmarks: int | None = 3
    every: int = 5  # about one token in `every` is a landmark; 0: none
    page: int = 16
    parts: int = 3
    dtype: torch.dtype = torch.float32


class Run:
    """Random documents in a paged cache that has been filled by prefill; `step` decodes one token of each."""

    def __init__(self, setting: Setting, steps: int, seed: int = 0) -> None:
        self.setting, random = setting, torch.Generator().manual_seed(seed)
        s = setting
        self.live = [i for i, n in enumerate(s.lengths) if n is not None]
        longest = max(n or 0 for n in s.lengths) + steps

        def draw(heads: int) -> Tensor:
            """[B T heads K], cut out of a wider tensor."""
            made = torch.randn(len(s.lengths), longest, heads + 1, s.width, generator=random)
            return made.to(s.dtype)[:, :, 1:]

        self.q, self.k, self.v = draw(s.heads), draw(s.kv_heads), draw(s.kv_heads)
        self.landmark = torch.rand(len(s.lengths), longest, generator=random) * s.every < float(s.every > 0)
        self.position = torch.randint(0, 10**6, (len(s.lengths), longest, 3), generator=random)
        self.weights = [torch.rand(s.width, generator=random) + 0.5 for _ in range(2)]
        local = s.window is not None
        self.cache = PagedCache(
            len(s.lengths) + 1, 2 * local, 2 * (not local), s.kv_heads, s.width, window=s.window, max_landmarks=s.max_landmarks,
            max_length=longest, page=s.page, dtype=s.dtype,
        )  # fmt: skip
        self.keys: PagedKeys = self.cache.local if local else self.cache.full
        self.keys.pool.fill_(float("nan"))
        self.past = list(s.lengths)
        self.rows = torch.tensor([-1 if n is None else len(s.lengths) - i for i, n in enumerate(s.lengths)], dtype=torch.int32)
        for entry in self.live:
            self._prefill(entry, steps)

    def _prefill(self, entry: int, steps: int) -> None:
        count, row = self.past[entry] or 0, int(self.rows[entry])
        local, full = self.cache.begin(row, self.landmark[entry, :count].tolist())
        table = rope_table(self.position[entry, :count], self.setting.width)
        slot = local if self.setting.window is not None else full
        k, v = self.k[entry, :count], self.v[entry, :count]
        cuda.norm_rope_store(k, v, self.weights[1], *table, slot, self.keys.pool[1], EPS)
        self.cache.reserve(row, count + steps)

    def new_step(self) -> Step:
        step = new_step(self.cache, len(self.rows), self.setting.heads, parts=self.setting.parts)
        step.rows.copy_(self.rows)
        return step

    def fill(self, step: Step) -> list[Tensor]:
        """Write the next tokens into the step; their q, k, v [B heads K]."""
        at = torch.tensor([n or 0 for n in self.past])
        entries = torch.arange(len(at))
        step.landmark.copy_(self.landmark[entries, at])
        step.position.copy_(self.position[entries, at])
        wide = [torch.cat([x[entries, at], x[entries, at]], 1) for x in (self.q, self.k, self.v)]
        return [x[:, x.shape[1] // 2 :] for x in wide]  # strides that are not those of a tensor of its own

    def step(self, step: Step, attend: Attend = decode_attention, advance: Callable[..., None] = decode_advance) -> Tensor:
        """Decode one token of every row -> [B H K]; the result starts as NaN."""
        q, k, v = self.fill(step)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        attend(q, k, v, *self.weights, step, self.keys, 1, eps=EPS, out=out)
        advance(step.rows, step.landmark, self.cache.state, self.cache.marked)
        self.past = [None if n is None else n + 1 for n in self.past]
        return out

    def truth(self) -> Tensor:
        """What the last step should have given, in float64, from whole documents and the layout's mask [B H K]."""
        s = self.setting
        out = torch.zeros(len(self.past), s.heads, s.width, dtype=torch.float64)
        for entry in self.live:
            count = self.past[entry] or 0
            none = torch.zeros(count, dtype=torch.int32)
            layout = StreamLayout.build(none, self.landmark[entry, :count], none - 1, s.window, s.max_landmarks)
            seen = layout.dense_mask()[-1]
            table = [x.double() for x in rope_table(self.position[entry, :count], s.width)]
            q, k, v = (x[entry, :count].double() for x in (self.q, self.k, self.v))
            q, k = qk_norm_rope(q, k, *(w.double() for w in self.weights), *table, EPS)
            k, v = (x[seen].repeat_interleave(s.heads // s.kv_heads, 1) for x in (k, v))
            weight = (torch.einsum("hk,thk->ht", q[-1], k) * s.width**-0.5).softmax(-1)
            out[entry] = torch.einsum("ht,thk->hk", weight, v)
        return out


POINTERS = (
    "q", "k", "v", "q_weight", "k_weight", "position", "turns", "axis", "rows", "state", "table", "landmark", "marked", "pool",
    "out", "partial", "arrived",
)  # fmt: skip
SIZES = ("batch", "heads", "groups", "parts", "page_bits", "table_width", "window", "max_landmarks", "store")


class Arguments(ctypes.Structure):
    """`Arguments` of csrc/emulate_decode.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")]
    _fields_ += [(name, ctypes.c_int) for name in SIZES]
    _fields_ += [("scale", ctypes.c_float), ("eps", ctypes.c_float)]


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def emulated(library: ctypes.CDLL, seed: int) -> Attend:
    """`decode_attention` by the emulated kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, step: Step, keys: PagedKeys, layer: int, *,
               eps: float, out: Tensor) -> Tensor:  # fmt: skip
        pool = keys.pool[layer]
        tensors = {
            "q": q, "k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight, "position": step.position, "turns": step.turns,
            "axis": step.axis, "rows": step.rows, "state": keys.state, "table": keys.table, "landmark": step.landmark,
            "marked": keys.marked, "pool": pool, "out": out, "partial": step.partial, "arrived": step.arrived,
        }  # fmt: skip
        sizes = (len(q), q.shape[1], k.shape[1], step.parts, keys.page.bit_length() - 1, keys.table.shape[1])
        strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
        numbers = [*strides, *sizes, keys.window, keys.max_landmarks, keys.store, q.shape[-1] ** -0.5, eps]
        arguments = Arguments(*(x.data_ptr() for x in tensors.values()), *numbers)
        library.decode_step_emulated.restype = ctypes.c_bool
        library.emulator_fault.restype = ctypes.c_char_p
        done = library.decode_step_emulated(ctypes.byref(arguments), q.shape[-1], KINDS[q.dtype], ctypes.c_uint64(seed))
        assert done, library.emulator_fault().decode()
        return out

    return attend
