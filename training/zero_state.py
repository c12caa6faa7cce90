"""Weights and moments under DeepSpeed, gathered whole and put back, whatever divides them: ZeRO, expert ranks, or both.

DeepSpeed's own checkpoints are bound to a world size and pickled. Here state goes parameter by parameter into the same
safetensors that the local engine writes: elastic, and exact in both directions. `deepspeed` is handed in, not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weft.model.transformer import Transformer
from weft.training.distributed import World
from weft.training.expert_parallel import ExpertGroups
from weft.training.optim import Optimizers

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """The state of one DeepSpeed engine. Every rank calls every method, in the same order."""

    def __init__(
        self, deepspeed: Any, stage: int, zero: Any, client: torch.optim.Optimizer, optimizers: Optimizers, model: Transformer,
        shapes: dict[str, torch.Size], groups: ExpertGroups, world: World,
    ) -> None:  # fmt: skip
        """zero: DeepSpeed's optimizer; client: ours inside it; shapes: of the whole parameters, by name."""
        self.deepspeed, self.stage, self.zero, self.client, self.optimizers = deepspeed, stage, zero, client, optimizers
        self.model, self.shapes, self.groups, self.world = model, shapes, groups, world
        self.names = dict(model.named_parameters())
        self.device = next(model.buffers()).device if stage == 3 else model.device

    def weights(self) -> dict[str, Tensor]:
        """Full weights and buffers on rank 0's CPU; every rank must call it."""
        out: dict[str, Tensor] = {}
        for name, p in self.names.items():
            with self._whole([p]):
                value = self.groups.whole(name, p.detach())
                if self.world.first and value is not None:
                    out[name] = value.cpu().clone().view(self.shapes[name])
        return {**out, **{name: b.detach().cpu().clone() for name, b in self.model.named_buffers()}}

    def moments(self) -> dict[str, Tensor]:
        """Full Adam moments on rank 0's CPU; every rank must call it."""
        if self.stage == 0:
            found = {name: self.groups.whole(name, value) for name, value in self.optimizers.state_tensors().items()}
            return {name: value for name, value in found.items() if value is not None}
        steps = self._steps()
        if steps is None:
            return {}
        self._link_moments()
        out: dict[str, Tensor] = {}
        for name, p in self.names.items():
            if not p.requires_grad:
                continue
            for key in MOMENTS:
                value = self.groups.whole(
                    name, self.deepspeed.utils.safe_get_full_optimizer_state(p, key).view(self._local_shape(name))
                )
                if self.world.first and value is not None:
                    out[f"{key}.{name}"] = value.detach().cpu().clone().view(self.shapes[name])
            out[f"step.{name}"] = steps.clone()
        return out

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor] | None) -> None:
        """Put weights (and moments) back, whatever engine and world size wrote them."""
        buffers = dict(self.model.named_buffers())
        for name, value in weights.items():
            if name in buffers:
                buffers[name].copy_(value)
            else:
                self._set_weight(self.names[name], self.groups.own(name, value))
        if moments is None:
            return
        if self.stage == 0:
            self.optimizers.load_state_tensors({name: self.groups.own(name, value) for name, value in moments.items()})
        elif moments:
            self._set_moments(moments)

    def _local_shape(self, name: str) -> torch.Size:
        """Shape of a parameter on this rank, before ZeRO-3 takes it apart."""
        whole = self.shapes[name]
        return torch.Size([whole[0] // self.groups.size, *whole[1:]]) if self.groups.divides(name) else whole

    def _set_weight(self, p: torch.nn.Parameter, value: Tensor) -> None:
        with self._whole([p], modify=True), torch.no_grad():
            p.copy_(value.view(p.shape))
        if self.stage and p.requires_grad:
            self._set_state(p, value, None)

    def _set_state(self, p: torch.nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write this rank's part of a float32 weight (key None) or moment."""
        utils = self.deepspeed.utils
        flat = value.to(self.device).reshape(-1)
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(p, flat, key) if key else utils.safe_set_full_fp32_param(p, flat)
            return
        part = int(p.ds_tensor.ds_numel)  # type: ignore[attr-defined]
        rank, size = p.ds_zero_partition_rank, p.ds_zero_partition_world_size  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(flat, (0, part * size - flat.numel()))  # DeepSpeed's full setter does not pad
        mine = padded[rank * part : (rank + 1) * part]
        utils.safe_set_local_optimizer_state(p, mine, key) if key else utils.safe_set_local_fp32_param(p, mine)

    def _set_moments(self, moments: dict[str, Tensor]) -> None:
        step = next(value for name, value in moments.items() if name.startswith("step."))
        for flat in self._partitions():
            state = self.client.state.setdefault(flat, {})
            state["step"] = step.clone()
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(flat.data)
        self._link_moments()
        for name, p in self.names.items():
            for key in MOMENTS:
                if f"{key}.{name}" in moments:
                    self._set_state(p, self.groups.own(name, moments[f"{key}.{name}"]), key)

    def _link_moments(self) -> None:
        """Tell every parameter where its moments are. ZeRO-1/2 does so once, after the first GROUP of the first update, when
        the other groups have none yet."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        """This rank's flat float32 pieces, the parameters that torch's AdamW sees."""
        return list(self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups)

    def _steps(self) -> Tensor | None:
        """Adam's step, or None before the first update."""
        for flat in self._partitions():
            if "step" in self.client.state.get(flat, {}):
                return torch.as_tensor(self.client.state[flat]["step"]).detach().cpu().float()
        return None

    @contextlib.contextmanager
    def _whole(self, params: list[torch.nn.Parameter], modify: bool = False) -> Iterator[None]:
        if self.stage == 3:
            with self.deepspeed.zero.GatheredParameters(params, modifier_rank=0 if modify else None):
                yield
        else:
            yield
