"""How the machine is used: precision, torch.compile, memory. Nothing here changes what is computed but rounding."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import AbstractContextManager

import torch

from engine.cli import UserError
from engine.training import distributed

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Below so many images in a whole run, ten epochs, compiling (20 to 40 s) takes longer than it saves. That differs by
# machine, from 2 epochs to 24: benchmarks/speed.md.
COMPILE_PAYS_FROM_IMAGES = 500_000


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of handing them back to the system after each step; True where it did.

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
    """The precision of the products in training: what `--precision` says, or the fastest safe one for "auto".

    bfloat16 where the device computes with it (CPU: Intel AMX or AVX-512 BF16; CUDA: since Ampere), float16 on older
    CUDA devices, otherwise float32. Convolutions and classifier are in it, and the activations they hand on; weights,
    BatchNorm's parameters and statistics, loss and optimizer are float32 throughout; so is evaluation.
    Raises UserError for float16 on a device other than CUDA.
    """
    if name == "float16" and device.type != "cuda":
        raise UserError("--precision float16: for CUDA devices only; use bfloat16 or float32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu" and cpu_has_bfloat16_units():
        return "bfloat16"
    return "float32"


def cpu_has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 numbers in hardware: by AMX or by AVX-512 BF16 (benchmarks/speed.md)."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(unit) for unit in ("amx_bf16", "avx512_bf16"))
    # torch 2.6 and its next successors know it under these names; every CPU with AMX has its bfloat16.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def may_be_emulated(precision: str, device: torch.device) -> bool:
    """Whether this is bfloat16 on a CPU not known to have units for it (other kinds than x86 are not known)."""
    return precision == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16_units()


def device_generator_state(device: torch.device) -> torch.Tensor | None:
    """The state of the device's own generator of random numbers, uint8 on the CPU; None for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def restore_device_generator(device: torch.device, state: torch.Tensor | None) -> None:
    """Undo what has been drawn since `device_generator_state`; nothing where the state is of another device."""
    current = device_generator_state(device)
    if state is None or current is None or state.shape != current.shape:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the forward pass runs; for float32 it does nothing."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling: needed by float16's narrow range only; otherwise it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def choose_compile(
    wanted: bool | None, device: torch.device, images: int, *, was: bool | None = None
) -> tuple[bool, str]:
    """Whether to compile the network, and a one-line notice if the answer needs one.

    wanted: --compile, --no-compile, or None to decide: on a GPU where it works and the run is long enough.
    images: training images of the whole run. was: of a run that is resumed, whether it was compiled; it stays so.
    Raises UserError where --compile is given and does not work.
    """
    if was is False or (was is None and wanted is False):
        return False, ""
    if was is None and wanted is None and device.type == "cpu":
        return False, ""  # it made training 3 % slower on one CPU, 15 % faster on another: benchmarks/speed.md
    if was is None and wanted is None and images < COMPILE_PAYS_FROM_IMAGES:
        return False, "Not compiled: the run is too short to repay it (--compile does it anyway)."
    error = _try_compile(device)
    if not distributed.any_rank(bool(error)):
        return True, ""
    error = error or "in another process"
    if was:
        return (
            False,
            f"Not compiled any more, so not the same to the last bit: torch.compile does not work ({error}).",
        )
    if wanted:
        raise UserError(f"--compile: torch.compile does not work here: {error}; leave the option out")
    return False, f"Not compiled: torch.compile does not work here ({error})."


def _try_compile(device: torch.device) -> str:
    """Compile and run a one-line function; the first line of what went wrong, or "" where it works."""
    try:
        result = torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(8, device=device))
        return "" if bool((result == 2).all()) else "a compiled function gave a wrong result"
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return (lines[0] if lines else type(error).__name__)[:160]


def silence_compiler() -> None:
    """Keep the compiler's own notes (no CUDA found, and so on) off the screen; errors still show."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import logging

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def describe(device: torch.device) -> str:
    """The machine in words, for the head of a run."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    return f"cpu ({torch.get_num_threads()} threads, {platform.machine() or sys.platform})"
