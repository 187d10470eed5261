"""Several processes under `torchrun`, or one: every function also works, and does nothing, in a single process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.cli import UserError


def start(device: torch.device) -> torch.device:
    """Join the other processes where `torchrun` started this one (it sets WORLD_SIZE); returns this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "mps":
        raise UserError("--device mps: several processes are supported on cpu and cuda only")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, on every one of them; `value` itself is not changed."""
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def any_rank(flag: int, device: torch.device) -> int:
    """The largest of the processes' flags: what one of them has seen, all of them act upon in the same step."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(flag, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around `module` where there are several processes.

    Gradients are averaged; BatchNorm statistics stay each process's own, so buffers are not broadcast.
    """
    if not dist.is_initialized():
        return module
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
