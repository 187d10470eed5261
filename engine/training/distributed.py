"""Several processes under `torchrun`, or one: every function also works, and does nothing, in a single process.

Each process trains on its shard of every batch; DistributedDataParallel averages the gradients, so the weights are
the same everywhere. BatchNorm statistics are each process's own: those of process 0, the writer, are scored and
saved.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.cli import EXIT_MISTAKE, Interrupted, UserError, ignore_signals, reason

_store: dist.Store | None = None  # a few values that all processes see, also when some of them have failed
_CONNECTION_LOST = "Connection (closed|reset) by peer|Broken pipe"  # gloo's words, in a RuntimeError
# What the group's threads were given last. To free such a tensor while Python does not hold it they need the
# interpreter's lock: once it shuts down, or waits for them to end, that would abort or hang the process.
_given: deque[Tensor] = deque(maxlen=64)


def start() -> None:
    """Join the other processes where `torchrun` started this one. Only process 0, the writer, prints from here on.

    Raises UserError where the others cannot be reached.
    """
    global _store
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    # gloo carries what concerns the host alone, also beside nccl: no question among processes waits for the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    # Functions of this module take the process group of the time of its import as their default, and would keep it.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        with _signals_end_it():
            _store, own_rank, processes = next(dist.rendezvous("env://"))
            dist.init_process_group(backend, store=_store, rank=own_rank, world_size=processes)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be joined ({reason(error)}); "
            "start several processes with torchrun"
        ) from error
    if not is_writer():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end of the process


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Waiting for the other processes is C++: Python's handlers would not run before it is over."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def stop() -> None:
    """Leave the other processes; the threads of the process group end with its last reference."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # DistributedDataParallel, which holds the group too, is in reference cycles
        _given.clear()


@contextmanager
def one_message() -> Iterator[None]:
    """Of several processes let the first that fails say why; the others, failing too or missing it, end quietly.

    A process that ends closes its connections, so no other waits for it. After a signal the writer speaks.
    """
    try:
        yield
    except Interrupted as stop:
        _first_to_fail()
        if not is_writer():
            stop.message = ""
        raise
    except Exception as error:
        if _store is not None:
            ignore_signals()  # torchrun sends SIGTERM once another process has ended: the line comes first
        if _first_to_fail():
            if isinstance(error, RuntimeError) and re.search(_CONNECTION_LOST, str(error)) and dist.is_initialized():
                raise UserError("another process has ended; start all of them again, with --resume") from error
            raise
        time.sleep(0.5)  # torchrun ends all processes once one has ended: let the first finish its line
        sys.exit(EXIT_MISTAKE)


def _first_to_fail() -> bool:
    if _store is None:
        return True
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        return False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on CUDA each process of a machine has its own. Raises UserError where it cannot."""
    if not dist.is_initialized() or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {device}: several processes train on cpu or cuda only")
    number, found = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if number >= found:
        raise UserError(
            f"--device cuda: one device a process is needed, and there are {found}; start fewer processes"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, on every one of them; `value` itself is not changed."""
    total = value.clone()
    if dist.is_initialized():
        _given.append(total)
        dist.all_reduce(total)
    return total


def all_ranks(value: Tensor) -> Tensor:
    """The processes' values in the order of their ranks, on every one of them: (...) -> (processes, ...)."""
    values = [value.clone() for _ in range(world_size())]
    if dist.is_initialized():
        _given.extend([*values, value])
        dist.all_gather(values, value)
    return torch.stack(values)


def barrier() -> None:
    """Wait until all processes have come here."""
    any_rank(0)


def agree(value: str, what: str) -> None:
    """Raises UserError unless `value` is the same in all processes."""
    own = torch.tensor(list(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8)
    if (all_ranks(own) != own).any():
        raise UserError(f"the processes differ in {what}; start all of them alike, with the same files")


def any_rank(flag: int) -> int:
    """The largest of the processes' flags: what one of them has seen, all of them act upon in the same step."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(flag)
    _given.append(value)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def gradient_share(images: int) -> float:
    """What the mean loss of this process's `images` images is multiplied by before the backward pass.

    The processes' gradients are averaged with equal weights. With this factor, images * processes / (images of all),
    that is the gradient of the mean over the whole batch, also where a short last batch has shards of unequal size.
    """
    if not dist.is_initialized():
        return 1.0
    return images * world_size() / int(sum_over_ranks(torch.tensor(images)))


@torch.no_grad()
def copy_buffers_from_writer(model: nn.Module) -> None:
    """Give all processes the writer's BatchNorm statistics, so that what they score is the network that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            _given.append(buffer)
            dist.broadcast(buffer, src=0)


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around `module` where there are several processes.

    Gradients are averaged; BatchNorm statistics stay each process's own, so buffers are not broadcast.
    """
    if not dist.is_initialized():
        return module
    wrapper = nn.parallel.DistributedDataParallel
    ids = [device.index] if device.type == "cuda" else None
    # One switch under two names: torch 2.14 warns about the old one.
    names = inspect.signature(wrapper).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return wrapper(module, device_ids=ids, **{switch: False})
