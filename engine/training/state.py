"""Whether the training state in a checkpoint fits this run: the same structure as a fresh one, everything finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.cli import UserError, reason


def state_after_a_step(optimizer: Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` is like once training has begun: of a copy, after a step with zero gradients.

    Raises UserError for an optimizer whose `step()` needs a closure: it could not be resumed.
    """
    twin = object.__new__(type(optimizer))
    twin.__dict__ = copy.deepcopy(optimizer.__dict__)  # with copies of the parameters
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        twin.step()
    except TypeError as error:
        raise UserError(f"{type(optimizer).__name__} cannot be used here: {reason(error)}") from error
    return twin.state_dict()


def check_form(saved: Any, fresh: Any, where: str, *, equal: bool = False) -> None:
    """Raise ValueError unless `saved` is finite and built as `fresh`: keys, lengths, types, shapes, dtypes.

    equal: numbers and names must be the same as well, but for the rounding of another machine.
    """
    if isinstance(fresh, dict):
        _require(isinstance(saved, dict) and saved.keys() == fresh.keys(), f"{where} has other entries")
        for key in fresh:
            check_form(saved[key], fresh[key], f"{where}.{key}", equal=equal)
    elif isinstance(fresh, list | tuple):
        _require(isinstance(saved, list | tuple) and len(saved) == len(fresh), f"{where} has another length")
        for one, other in zip(saved, fresh, strict=True):
            check_form(one, other, where, equal=equal)
    elif isinstance(fresh, Tensor):
        same = isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (fresh.shape, fresh.dtype)
        _require(same, f"{where} has no tensor, or one of another shape or type")
        _require(bool(saved.isfinite().all()), f"{where} is not finite")
    elif isinstance(fresh, int | float) and not isinstance(fresh, bool):
        _require(type(saved) in (int, float) and math.isfinite(saved), f"{where} has no number where one is needed")
        _require(not equal or math.isclose(saved, fresh, rel_tol=1e-6, abs_tol=1e-12), f"{where} has other settings")
    else:
        _require(type(saved) is type(fresh), f"{where} has a value of another type")
        _require(not equal or saved == fresh, f"{where} has other settings")


def check_history(history: Any, epoch: Any, epochs: int, required: set[str]) -> None:
    """Raise ValueError unless `history` has one row of finite numbers for each of `epoch` <= `epochs` epochs."""
    _require(type(epoch) is int and 0 < epoch <= epochs, f"epoch is not a number from 1 to {epochs}")
    _require(isinstance(history, list) and len(history) == epoch, "history has not one row per epoch")
    _require(isinstance(history[0], dict) and required <= history[0].keys(), f"history lacks one of {required}")
    for number, row in enumerate(history, 1):
        check_form(row, dict.fromkeys(history[0], 0.0), "history")
        _require(max(map(abs, row.values())) < 1e30, "history holds a number too large to be drawn")
        _require(row["epoch"] == number, "the epochs of history are not in order")
    _require(all(isinstance(name, str) and name.isidentifier() for name in history[0]), "history has strange columns")


def check_best(best: Any, history: list[dict[str, float]], state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError unless `best` is an epoch of `history` with weights that fit `state_dict`."""
    check_form(best, {"epoch": 1, "metrics": history[0], "state_dict": state_dict}, "best")
    _require(best["metrics"] == history[best["epoch"] - 1], "best is not an epoch of its history")
    variances = [value for name, value in best["state_dict"].items() if name.endswith("running_var")]
    _require(all(bool((value >= 0).all()) for value in variances), "best has negative variances")


def in_own_memory(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with each tensor laid out in memory as its parameter is, and shared with nothing.

    The fused optimizers go through weights and moments side by side and ignore strides; in a file the
    strides may be anything, and several tensors may share one memory.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def own(value: Any, parameter: Tensor) -> Any:
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        return value.clone() if isinstance(value, Tensor) else value

    state = {
        index: {key: own(value, parameters[index]) for key, value in moments.items()}
        for index, moments in saved["state"].items()
    }
    return saved | {"state": state}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
