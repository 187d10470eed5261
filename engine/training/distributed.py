"""Several processes under `torchrun`, or one: every function also works, and does nothing, in a single process.

Each process trains on its shard of every batch; DistributedDataParallel averages the gradients, so the weights are
the same everywhere. BatchNorm statistics are each process's own: those of process 0, the writer, are saved.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.cli import UserError, reason


def start() -> None:
    """Join the other processes where `torchrun` started this one. Only process 0, the writer, prints from here on.

    Raises UserError where the others cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    # Functions of this module keep the process group of the time of its import; its threads would never end.
    importlib.import_module("torch.distributed.nn.functional")
    # gloo carries what concerns the host alone, also beside nccl.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    # Waiting for the others is C++, in which Python's handlers do not run: a signal then ends the process itself.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is set; the other processes cannot be joined ({reason(error)}): use torchrun"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not is_writer():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end of the process


def stop() -> None:
    """Leave the other processes. The threads of the process group end with its last reference."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # DistributedDataParallel holds the group too, in a reference cycle


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on CUDA each process of a machine has its own. Raises UserError where it cannot."""
    if world_size() == 1 or device.type == "cpu":
        return device
    number, found = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if device.type != "cuda" or number >= found:
        raise UserError(f"--device {device}: {world_size()} processes need as many CUDA devices, or --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, on every one of them; `value` itself is not changed."""
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def agree(value: str, what: str) -> None:
    """Raises UserError unless `value` is the same in all processes."""
    own = torch.tensor(list(hashlib.sha256(value.encode()).digest()), dtype=torch.int64)
    if (sum_over_ranks(own) != own * world_size()).any():
        raise UserError(f"the processes differ in {what}; start all of them alike, with the same files")


@torch.no_grad()
def copy_buffers_from_writer(model: nn.Module) -> None:
    """Give all processes the writer's BatchNorm statistics, so that what they score is the network that is saved."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, src=0)


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around `module` where there are several processes. Buffers stay each process's own."""
    if not dist.is_initialized():
        return module
    wrapper = nn.parallel.DistributedDataParallel
    # One switch under two names: torch 2.14 warns about the old one.
    names = inspect.signature(wrapper).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return wrapper(module, device_ids=[device.index] if device.type == "cuda" else None, **{switch: False})
