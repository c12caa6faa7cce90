"""The few words that ranks exchange: counts before a step, agreement after it, embeddings for the contrastive loss.

In one process every function is the identity, so the loop has one path. `torch.distributed` is used only in this folder.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Who we are among the processes of the run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True on the process that writes files."""
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, Slurm) described a world in the environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def describe_single_process() -> None:
    """Fill in the environment of a one-process world, so that a plain command needs no launcher and no MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def slurm_to_launcher() -> None:
    """Translate `srun`'s variables to the launcher's, where only those are present."""
    if launched() or "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"srun started {os.environ['WORLD_SIZE']} tasks but {' and '.join(missing)} is not set; export it")


def start(timeout_s: float = 120.0, device: str = "auto") -> World:
    """Join the process group that the launcher described; a no-op in a single process. device: as `EngineConfig` names it."""
    slurm_to_launcher()
    if not launched():
        return World()
    if not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1:
        backend = "nccl" if torch.cuda.is_available() and device != "cpu" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return world()


def world() -> World:
    """The current world."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_counts(counts: Tensor) -> Tensor:
    """float64 [N] of every rank as [W N]."""
    if world().size == 1:
        return counts[None]
    mine = counts.to(_device())
    rows = [torch.empty_like(mine) for _ in range(world().size)]
    dist.all_gather(rows, mine)
    return torch.stack(rows).to(counts.device)


def gather_integers(numbers: Tensor) -> Tensor:
    """int64 [N] of every rank as [W N], to the last bit."""
    if world().size == 1:
        return numbers[None]
    mine = numbers.to(_device())
    rows = [torch.empty_like(mine) for _ in range(world().size)]
    dist.all_gather(rows, mine)
    return torch.stack(rows).to(numbers.device)


def gather_flat(mine: Tensor, sizes: list[int]) -> list[Tensor]:
    """Flat tensors of every rank, of `sizes[rank]` numbers each."""
    if world().size == 1:
        return [mine]
    padded = mine.new_zeros(max(sizes))
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes)]


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows [P_r D] of every rank, one after the other; gradient flows into this rank's own rows only.

    Every rank must call this, also with no rows. The gradient of a loss over the result, taken on each rank with respect to
    its own rows and summed over ranks by the engine, is the full gradient: no collective is needed in the backward pass.
    """
    me = world()
    if me.size == 1:
        return rows
    longest = max(sizes)
    if longest == 0:
        return rows
    padded = rows.new_zeros(longest, rows.size(1))
    padded[: rows.size(0)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(me.size)]
    dist.all_gather(parts, padded)
    return torch.cat([rows if r == me.rank else part[:size] for r, (part, size) in enumerate(zip(parts, sizes))])


def agree(values: list[float]) -> list[float]:
    """The largest of each value over all ranks."""
    return gather_counts(torch.tensor(values, dtype=torch.float64)).amax(0).tolist()


def barrier() -> None:
    """Wait for every rank."""
    if world().size > 1:
        dist.barrier()


def leave(code: int = 0) -> None:
    """End a worker process: barrier, flush, `os._exit`. Interpreter teardown aborts now and then under gloo (2 of 20 runs
    measured)."""
    if world().size > 1:
        if code == 0:
            dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
