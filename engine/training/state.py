"""Whether the training state in a checkpoint can be one of this run: a right checksum does not say who made it."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.training.muon import Muon
from models.resnet_s import weight_layers

_MOMENTS = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
    Muon: {"momentum_buffer"},
}
_MOVING = ("last_epoch", "_step_count", "_last_lr")  # entries of a schedule that say how far it is
_LARGEST = 1e30  # of a measured number: larger ones overflow where they are drawn


def check_training_state(
    state: dict[str, Any],
    fresh: dict[str, Any],
    model: nn.Module,
    optimizers: list[Optimizer],
    *,
    epochs: int,
    steps_per_epoch: int,
    accuracy: str,
) -> None:
    """Raise ValueError or KeyError unless `state` is built as `fresh`, that of the same run before its first step.

    accuracy: the name in the metrics of what the best epoch is chosen by.
    """
    for name in ("schedulers", "scaler", "rng", "totals", "seconds", "wandb_id"):
        _check_form(state[name], fresh[name], name)
    _check_schedule(state["schedulers"], fresh["schedulers"])
    epoch = _whole(state["epoch"], epochs, "epoch")
    steps = _whole(state["steps_done"], steps_per_epoch, "steps_done")
    _whole(state.get("threads", 1), 10**6, "threads")  # older versions wrote none
    _check_watch(state["watch"], fresh["watch"], model, within=steps > 0)
    _require(isinstance(state["history"], list) and len(state["history"]) == epoch, "history has not a row an epoch")
    for number, row in enumerate(state["history"], 1):
        _check_metrics(row, accuracy)
        _require(row["epoch"] == number, "the epochs of history are not in order")
    if epoch or state["best"] != {}:
        best = state["best"]
        _require(isinstance(best, dict) and {"epoch", "metrics", "state_dict"} <= best.keys(), "best is none")
        _whole(best["epoch"], epoch, "best")
        _check_metrics(best["metrics"], accuracy)
        _check_form(best["state_dict"], model.state_dict(), "best")
        variances = [value for key, value in best["state_dict"].items() if key.endswith("running_var")]
        _require(all(bool((value >= 0).all()) for value in variances), "best has negative variances")
    _require(isinstance(state["optimizers"], list) and len(state["optimizers"]) == len(optimizers), "optimizers")
    for saved, mine in zip(state["optimizers"], optimizers, strict=True):
        _check_optimizer(saved, mine, begun=epoch + steps > 0, scaled=bool(state["scaler"]))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _whole(value: Any, most: int, where: str) -> int:
    _require(type(value) is int and 0 <= value <= most, f"{where} is not a number from 0 to {most}")
    return value


def _check_form(saved: Any, fresh: Any, where: str) -> None:
    """The same keys, kinds of values, shapes and types all the way down; every number finite."""
    if isinstance(fresh, dict):
        _require(isinstance(saved, dict) and saved.keys() == fresh.keys(), f"{where} has other entries")
        for key in fresh:
            _check_form(saved[key], fresh[key], where)
    elif isinstance(fresh, list | tuple):
        _require(isinstance(saved, list | tuple) and len(saved) == len(fresh), f"{where} has another length")
        for one, other in zip(saved, fresh, strict=True):
            _check_form(one, other, where)
    elif isinstance(fresh, Tensor):
        _require(isinstance(saved, Tensor), f"{where} holds no tensor")
        _require((saved.shape, saved.dtype) == (fresh.shape, fresh.dtype), f"{where} has another shape or type")
        _require(bool(saved.isfinite().all()), f"{where} is not finite")
    elif isinstance(fresh, bool) or not isinstance(fresh, int | float):
        _require(type(saved) is type(fresh), f"{where} has a value of another type")
    else:
        _require(type(saved) in (int, float) and math.isfinite(saved), f"{where} has no number where one is needed")


def _check_schedule(saved: Any, fresh: Any) -> None:
    """The same numbers all the way down, apart from those that say how far it is. The form has been checked."""
    if isinstance(fresh, dict):
        for key in fresh:
            if key not in _MOVING:
                _check_schedule(saved[key], fresh[key])
    elif isinstance(fresh, list | tuple):
        for one, other in zip(saved, fresh, strict=True):
            _check_schedule(one, other)
    elif not isinstance(fresh, bool):
        _require(saved == fresh, "schedulers: not the schedule of this run")


def _check_metrics(row: Any, accuracy: str) -> None:
    _require(isinstance(row, dict) and {"epoch", accuracy} <= row.keys(), f"metrics of an epoch lack {accuracy}")
    for key, value in row.items():
        _require(isinstance(key, str) and re.fullmatch(r"[a-z_]{1,40}", key), "metrics have a strange name")
        _require(type(value) in (int, float) and abs(value) < _LARGEST, "metrics are no numbers")


def _check_watch(saved: Any, fresh: dict[str, Tensor], model: nn.Module, *, within: bool) -> None:
    """The signs of all binary weights at the beginning of the epoch; none between two epochs."""
    _require(isinstance(saved, dict) and saved.keys() == fresh.keys(), "watch has other entries")
    weights = sum(layer.weight.numel() for _, layer in weight_layers(model)) if within else 0
    for key, value in saved.items():
        _require(isinstance(value, Tensor) and value.dtype == fresh[key].dtype, f"watch: {key} is no tensor of signs")
        _require(tuple(value.shape) == (weights,), f"watch: {key} has another shape")


def _alike(value: Tensor, parameter: Tensor) -> bool:
    return (value.shape, value.dtype) == (parameter.shape, parameter.dtype)


def _check_optimizer(saved: Any, mine: Optimizer, *, begun: bool, scaled: bool) -> None:
    """Its options are those of this run, its moments have the shapes of the parameters and are finite; each parameter
    has them once training has begun.

    scaled: the loss is scaled for float16, and steps whose gradients overflow are left out, the first ones as a rule.
    """
    _require(isinstance(saved, dict) and saved.keys() == {"state", "param_groups"}, "optimizers: other entries")
    groups = mine.state_dict()["param_groups"]
    _check_form(saved["param_groups"], groups, "optimizers")
    for one, other in zip(saved["param_groups"], groups, strict=True):
        for key in other:
            _require(key == "lr" or one[key] == other[key], f"optimizers: {key} is not that of this run")
    parameters = [p for group in mine.param_groups for p in group["params"]]
    _require(isinstance(saved["state"], dict), "optimizers: no state")
    every = set(range(len(parameters))) if begun else set()
    none_yet = scaled and not saved["state"]
    _require(set(saved["state"]) == every or none_yet, "optimizers: not one state a weight")
    for index, moments in saved["state"].items():
        _require(isinstance(moments, dict) and moments.keys() == _MOMENTS[type(mine)], "optimizers: other moments")
        for key, value in moments.items():
            wanted = torch.ones(()) if key == "step" else parameters[index]
            fits = isinstance(value, Tensor) and _alike(value, wanted) and bool(value.isfinite().all())
            _require(
                fits and (key != "step" or value.item() >= (0 if scaled else 1)),
                "optimizers: a moment that does not fit",
            )


def moments_in_own_memory(saved: dict[str, Any], mine: Optimizer) -> dict[str, Any]:
    """A checked optimizer state with each moment laid out in memory as its parameter is, and shared with nothing.

    The fused optimizers go through weights and moments side by side without a look at strides; in a file the
    strides may be anything, and several tensors one memory.
    """
    parameters = [p for group in mine.param_groups for p in group["params"]]
    state = {
        index: {
            key: value.clone() if value.ndim == 0 else torch.empty_like(parameters[index]).copy_(value)
            for key, value in moments.items()
        }
        for index, moments in saved["state"].items()
    }
    return saved | {"state": state}
