"""Optimisers and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from corrmatch.config import TrainConfig


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration asks for. Groups have a `name`, an `lr` and `params`."""
    if not train.decay_norms:
        groups = [part for group in groups for part in _without_decay(group)]
    decay = train.weight_decay
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=train.momentum, weight_decay=decay, nesterov=train.nesterov)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer](groups, weight_decay=decay)


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, steps: int) -> LambdaLR:
    """The schedule of the learning rate over `steps` steps: a linear warm-up times the decay.

    A group with a `least_lr` does not fall below it.
    """

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (train.warmup + 1))
        if train.schedule == "constant":
            return rise
        return rise * (1 - step / steps) ** train.power if step < steps else 0.0

    def bounded(group: dict[str, Any]) -> Callable[[int], float]:
        least = group.get("least_lr", 0.0) / group["lr"] if group["lr"] > 0 else 0.0
        return lambda step: max(factor(step), least)

    return LambdaLR(optimizer, [bounded(group) for group in optimizer.param_groups])


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each group, by name."""
    return {f"lr_{group['name']}": float(group["lr"]) for group in optimizer.param_groups}


def _without_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a group in two: norms and biases, which have one dimension, get no weight decay."""
    weights = [p for p in group["params"] if p.dim() > 1]
    others: list[nn.Parameter] = [p for p in group["params"] if p.dim() <= 1]
    return [group | {"params": weights}, group | {"params": others, "weight_decay": 0.0}]
