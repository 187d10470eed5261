"""How the machine is used: precision, torch.compile, memory. Nothing here changes what is computed but rounding."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from contextlib import AbstractContextManager

import torch

from engine.cli import UserError, reason

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the system after each step; True where it did.

    Activations of some megabytes are allocated and freed at every layer; each return costs page faults anew.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of the products in training: what `--precision` says, or for "auto" the fastest safe one.

    bfloat16 where the device computes with it (CPU: Intel AMX or AVX-512 BF16; CUDA: since Ampere), else float32.
    Convolutions, the classifier and their output activations are in it; weights, BatchNorm's parameters and
    statistics, loss and optimizer are float32 throughout; so is evaluation.
    """
    if name != "auto":
        return name
    fast = device.type == "cpu" and cpu_has_bfloat16_units()
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "float32"


def cpu_has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 numbers in hardware: by AMX or by AVX-512 BF16 (docs/speed.md)."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch 2.6 and its successors


def may_be_emulated(precision: str, device: torch.device) -> bool:
    """Whether this is bfloat16 on a CPU not known to have units for it (other kinds than x86 are not known)."""
    return precision == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16_units()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the forward pass runs; for float32 it does nothing."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators that a run on `device` draws from, uint8 on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: dict[str, torch.Tensor]) -> None:
    """Undo what has been drawn since `generator_states`, from the generators that `states` names."""
    for kind, state in states.items():
        (torch if kind == "cpu" else getattr(torch, kind)).set_rng_state(state)


def choose_compile(wanted: bool | None, device: torch.device, *, required: bool) -> tuple[bool, str]:
    """Whether to compile the network, and a one-line notice if the answer needs one.

    wanted: True or False as the user or the run that is resumed has it, or None for the default: on CUDA devices
    where it works, not on CPUs, where it was between 5 % slower and 31 % faster (docs/speed.md).
    Raises UserError where it is `required`, that is, --compile was typed, and does not work.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False, ""
    error = _try_compile(device)
    if error and required:
        raise UserError(f"--compile: torch.compile does not work here: {error}; leave the option out")
    return not error, f"Not compiled: torch.compile does not work here ({error})." if error else ""


def _try_compile(device: torch.device) -> str:
    """Compile and run a one-line function; the first line of what went wrong, or "" where it works."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(8, device=device))
        return ""
    except Exception as error:
        return reason(error)[:160]


def silence_compiler() -> None:
    """Keep the compiler's own notes (no CUDA found, and so on) off the screen; errors still show."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def describe(device: torch.device) -> str:
    """The machine in words, for the head of a run."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    return f"cpu ({torch.get_num_threads()} threads, {platform.machine() or sys.platform})"
