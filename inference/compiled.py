"""Decoding as one compiled function of fixed shape: `torch.compile` on a CPU, and recorded as a CUDA graph on a GPU.

In: a model. Out: `CompiledModel`, which is that model in every respect but one: a call that gives each document a single token
runs over `Lanes` (fixed buffers, fixed addresses) as one graph instead of some hundred calls. Prefills, media with features and
training-style forwards go to the model itself. Visibility is the cache's own: a single token sees exactly its live slots.

Results equal the model's to rounding, not to the bit: the compiler joins operations and picks other products, so that the law
"same bits in any batch" holds only for the model as it is.

Axes: `B lanes  D width  G kv heads  R query heads per kv head  S slots  K head width  E experts  C experts per token`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.inference.around import Around
from weft.inference.errors import CheckpointError
from weft.inference.lanes import KINDS, LEAST_SLOTS, Lanes, fits, idle, lanes_for, slots_for, steps_of
from weft.model.cache import StreamCache
from weft.model.moe import MoE

ROUND = 64
"""On a CPU a step reads a multiple of this many slots instead of the whole lane."""
WARMUPS = 3
"""Runs before a CUDA graph is recorded, as torch's notes on CUDA graphs ask for."""
INPUTS = ("ids", "modality", "channel", "position")


MOST_VERSIONS = 64
"""Of the step that are compiled: torch stops at 8, and a server meets more numbers of documents than that."""


class CompiledModel(Around):
    """A `Transformer` whose single-token steps are compiled. Everything else is the model's own."""

    def __init__(self, model: Any, compiler: Callable[[Step], Callable[..., Tensor]] | None = None) -> None:
        """Compiles the step for one and for several documents at once; raises `CheckpointError` where it does not work.

        `compiler` makes a function of a step; None is `torch.compile` for any number of documents and slots.
        """
        if model.config.last_medium:
            raise CheckpointError("a compiled step sees every live key, and last_medium hides some; load without compile=True")
        self.inner = model
        self._lock = threading.Lock()
        self._pool: list[Lanes] = []
        self._is_graphed = model.device.type == "cuda"
        try:
            step = Step(model).eval()
            self._step = compiler(step) if compiler else torch.compile(step, dynamic=True, fullgraph=True)
            self._warm()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"the decoding step does not compile on {model.device} ({reason}); load without compile=True"
            ) from error

    def extend(self, new: Any, caches: Sequence[StreamCache], lengths: Sequence[int]) -> Tensor:
        """As `Transformer.extend`; single tokens without features take the compiled step."""
        single = all(length == 1 for length in lengths) and len(lengths) == len(caches) > 0
        if not single or any(len(rows) for rows in new.features.values()) or bool((new.two_way >= 0).any()):
            return self.inner.extend(new, caches, lengths)
        with torch.inference_mode():
            return self._extend(new, caches)

    def _extend(self, new: Any, caches: Sequence[StreamCache]) -> Tensor:
        changes = steps_of(caches, new.landmark.tolist())
        lanes = self._lanes(caches, changes)
        at = [lanes.lane_of(cache) for cache in caches]
        device = new.ids.device
        where = torch.tensor(at, device=device)
        slots = idle(lanes, device)
        for kind in KINDS:
            for cache, change in zip(caches, changes):
                store = getattr(cache, kind)
                store.move(change[kind], slice(None))  # what is moved has died or is overwritten by the step
            slots[f"{kind}_at"][where] = torch.tensor([change[kind].targets for change in changes], device=device)
            slots[f"{kind}_seen"][where] = torch.tensor([change[kind].used for change in changes], device=device)
        rows = {}
        for name in INPUTS:
            value = getattr(new, name).long()
            rows[name] = value.new_zeros((lanes.size, *value.shape[1:])).index_copy_(0, where, value)
        hidden = self._run(lanes, rows | slots).index_select(0, where)
        for cache, change in zip(caches, changes):
            for kind in KINDS:
                getattr(cache, kind).commit(change[kind])
            cache.open_block = -1
        return hidden

    def _lanes(self, caches: Sequence[StreamCache], changes: Sequence[dict[str, Any]]) -> Lanes:
        """The buffer in which all of these lie; if there is none that fits, they move into one."""
        size = lanes_for(len(caches))
        with self._lock:
            for lanes in self._pool:
                if lanes.size == size and fits(lanes, changes) and all(lanes.lane_of(c) is not None for c in caches):
                    return lanes
            slots = slots_for(caches)
            mine = next((x for x in self._pool if (x.size, x.slots) == (size, slots) and x.is_free), None)
            if mine is None:
                self._pool = [x for x in self._pool if not x.is_free]  # other shapes may go; their graphs with them
                mine = Lanes(caches[0], size, slots)
                self._pool.append(mine)
            mine.adopt(caches)
            return mine

    def _run(self, lanes: Lanes, inputs: dict[str, Tensor]) -> Tensor:
        if self._is_graphed:
            return self._replayed(lanes, inputs)
        data = {}
        for kind in KINDS:
            seen = max(int(inputs[f"{kind}_seen"].max()), lanes.used(kind))
            end = min(-(-(seen + 1) // ROUND) * ROUND, lanes.slots[kind])
            inputs[f"{kind}_at"].clamp_(max=end - 1)  # idle lanes write to the last slot of what is read
            data[kind] = lanes.data[kind][..., :end, :]
        with torch._dynamo.config.patch(recompile_limit=MOST_VERSIONS):
            return self._step(**inputs, **data)

    def _replayed(self, lanes: Lanes, inputs: dict[str, Tensor]) -> Tensor:
        """One recorded graph per buffer: inputs are copied to fixed places, the result is read from one. Not run yet."""
        if lanes.graph is None:
            lanes.graph = Recorded(self._step, inputs, lanes.data)
        return lanes.graph(inputs)

    def _warm(self) -> None:
        """Compile for one lane and for several, so that later calls trace no other version (inductor may add its own).

        The compiler takes sizes that are equal here for equal ever after, so the several are a number that no other axis has,
        and the two buffers are read to different ends.
        """
        empty = torch.zeros(0, dtype=torch.int64, device=self.inner.device)
        cache = self.inner.new_cache()
        sizes = {size for kind in KINDS for size in getattr(cache, kind).data.shape} | {3}
        several = next(count for count in range(5, 99) if count not in sizes)
        with torch.inference_mode():
            for count in (1, several):
                lanes = Lanes(cache, count, {kind: LEAST_SLOTS << i for i, kind in enumerate(KINDS)})
                rows = {name: empty.new_zeros((count, 3) if name == "position" else (count,)) for name in INPUTS}
                slots = idle(lanes, self.inner.device)
                slots["full_seen"] += ROUND
                self._run(lanes, rows | slots)


class Step(nn.Module):
    """One token for every lane, as a pure function of its inputs and buffers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.place = dict(model.new_cache().place)

    def forward(
        self,
        ids: Tensor,
        modality: Tensor,
        channel: Tensor,
        position: Tensor,
        local_at: Tensor,
        local_seen: Tensor,
        full_at: Tensor,
        full_seen: Tensor,
        local: Tensor,
        full: Tensor,
    ) -> Tensor:
        """int64 [B] each, position [B 3], buffers [layers 2 B G S K] -> hidden states [B D]; writes the buffers."""
        embedding, model = self.model.embedding, self.model
        x = embedding.tokens(ids) + embedding.modality(modality) + embedding.channel(channel)
        rotary = model.rotary(position)
        kinds = {
            False: (local, local_at, _visible(local, local_seen)),
            True: (full, full_at, _visible(full, full_seen)),
        }
        rows = torch.arange(len(ids), device=ids.device)
        for layer, block in enumerate(model.blocks):
            data, at, visible = kinds[self.config.is_full(layer)]
            keys, values = data[self.place[layer]].unbind(0)  # [B G S K]
            q, k, v = block.attention.project(block.attention_norm(x), rotary)
            keys[rows, :, at] = k.to(keys.dtype)
            values[rows, :, at] = v.to(values.dtype)
            groups, width = keys.shape[1], keys.shape[3]
            query = q.reshape(len(ids), groups, -1, width)
            mixed = F.scaled_dot_product_attention(query, keys.to(q.dtype), values.to(q.dtype), attn_mask=visible)
            x = x + block.attention.out(mixed.flatten(1).to(x.dtype))
            h = block.ffn_norm(x)
            if block.ffn is not None:
                x = x + block.ffn(h)
            if block.mlp is not None:
                x = x + routed(block.mlp, h)
        return model.norm(x)


def _visible(data: Tensor, seen: Tensor) -> Tensor:
    """bool [B 1 1 S]: live slots are the first ones."""
    return (torch.arange(data.shape[4], device=seen.device) < seen[:, None])[:, None, None]


def routed(mlp: MoE, h: Tensor) -> Tensor:
    """What the experts add to h [B D], without a shape that depends on the routing.

    One row gathers its experts' matrices. For several rows every expert computes every row and the gate keeps what was chosen:
    decoding waits for weights, and several rows read most of them anyway.
    """
    routing = mlp.route(h)
    weight = routing.weight.to(h.dtype)
    up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    if len(h) == 1 and isinstance(up, Tensor):
        chosen = routing.expert[0]
        hidden = swiglu(torch.einsum("cfd,d->cf", up[chosen], h[0]))
        return torch.einsum("cdf,cf,c->d", down[chosen], hidden, weight[0])[None]
    out = torch.zeros_like(h)
    for expert in range(len(up)):
        share = torch.where(routing.expert == expert, weight, 0.0).sum(-1, keepdim=True)
        out = out + share * F.linear(swiglu(F.linear(h, up[expert])), down[expert])
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [N 2F], the gate first -> [N F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Recorded:
    """A step recorded as a CUDA graph over fixed inputs, buffers and output. Not run: needs a GPU."""

    def __init__(self, step: Callable[..., Tensor], inputs: dict[str, Tensor], data: dict[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        kept = {kind: value.clone() for kind, value in data.items()}  # the runs before recording write keys
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                step(**self.inputs, **data)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step(**self.inputs, **data)
        for kind, value in data.items():
            value.copy_(kept[kind])

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Copy the inputs in, replay, and hand out a copy of the result."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.output.clone()
