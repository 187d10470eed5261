"""Whether the training state in a checkpoint can be one of this run: a right checksum does not say who made it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from models.resnet_s import weight_layers


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
    epoch = _whole(state["epoch"], epochs, "epoch")
    steps = _whole(state["steps_done"], steps_per_epoch, "steps_done")
    _check_watch(state["watch"], fresh["watch"], model, within=steps > 0)
    _require(isinstance(state["history"], list) and len(state["history"]) == epoch, "history has not a row an epoch")
    for row in state["history"]:
        _check_metrics(row, accuracy)
    if epoch or state["best"] != {}:
        best = state["best"]
        _require(isinstance(best, dict) and {"epoch", "metrics", "state_dict"} <= best.keys(), "best is none")
        _whole(best["epoch"], epoch, "best")
        _check_metrics(best["metrics"], accuracy)
        _check_form(best["state_dict"], model.state_dict(), "best")
    _require(isinstance(state["optimizers"], list) and len(state["optimizers"]) == len(optimizers), "optimizers")
    for saved, mine in zip(state["optimizers"], optimizers, strict=True):
        _check_optimizer(saved, mine)


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


def _check_metrics(row: Any, accuracy: str) -> None:
    _require(isinstance(row, dict) and {"epoch", accuracy} <= row.keys(), f"metrics of an epoch lack {accuracy}")
    _require(all(isinstance(key, str) and type(row[key]) in (int, float) for key in row), "metrics are no numbers")


def _check_watch(saved: Any, fresh: dict[str, Tensor], model: nn.Module, *, within: bool) -> None:
    """The signs of all binary weights at the beginning of the epoch; none between two epochs."""
    _require(isinstance(saved, dict) and saved.keys() == fresh.keys(), "watch has other entries")
    weights = sum(layer.weight.numel() for _, layer in weight_layers(model)) if within else 0
    for key, value in saved.items():
        _require(isinstance(value, Tensor) and value.dtype == fresh[key].dtype, f"watch: {key} is no tensor of signs")
        _require(tuple(value.shape) == (weights,), f"watch: {key} has another shape")


def _alike(value: Tensor, parameter: Tensor) -> bool:
    return (value.shape, value.dtype) == (parameter.shape, parameter.dtype)


def _check_optimizer(saved: Any, mine: Optimizer) -> None:
    """Its options are those of this run, its moments have the shapes of the parameters and are finite."""
    _require(isinstance(saved, dict) and saved.keys() == {"state", "param_groups"}, "optimizers: other entries")
    groups = mine.state_dict()["param_groups"]
    _check_form(saved["param_groups"], groups, "optimizers")
    for one, other in zip(saved["param_groups"], groups, strict=True):
        for key in other:
            _require(key == "lr" or one[key] == other[key], f"optimizers: {key} is not that of this run")
    parameters = [p for group in mine.param_groups for p in group["params"]]
    _require(isinstance(saved["state"], dict), "optimizers: no state")
    for index, moments in saved["state"].items():
        _require(
            type(index) is int and 0 <= index < len(parameters) and isinstance(moments, dict), "optimizers: state"
        )
        for value in moments.values():
            fits = value is None or (
                isinstance(value, Tensor) and (value.ndim == 0 or _alike(value, parameters[index]))
            )
            _require(
                fits and (value is None or bool(value.isfinite().all())), "optimizers: a moment that does not fit"
            )
