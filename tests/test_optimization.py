"""Optimisers, parameter groups and learning rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from corrmatch.config import TrainConfig
from corrmatch.training.optimization import make_optimizer, make_schedule, rates


def groups(lr=0.1):
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    return network, [{"name": "head", "lr": lr, "params": list(network.parameters())}]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [({}, torch.optim.SGD), ({"optimizer": "adam"}, torch.optim.Adam), ({"optimizer": "adamw"}, torch.optim.AdamW)],
)
def test_optimizers_step_as_torch_does(keys, kind):
    torch.manual_seed(3)
    network, parts = groups()
    expected = torch.nn.Parameter(network[0].weight.detach().clone())
    train = TrainConfig(weight_decay=0.1, **keys)
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    ours, theirs = make_optimizer(parts, train), kind([expected], lr=0.1, weight_decay=0.1, **extra)
    for _ in range(3):
        gradient = torch.randn_like(expected)
        network[0].weight.grad, expected.grad = gradient.clone(), gradient
        ours.step()
        theirs.step()
    assert torch.equal(network[0].weight, expected)


def test_nesterov():
    _, parts = groups()
    assert make_optimizer(parts, TrainConfig(nesterov=True)).param_groups[0]["nesterov"]


def test_norms_and_biases_can_be_left_undecayed():
    network, parts = groups()
    decayed, others = make_optimizer(parts, TrainConfig(weight_decay=0.5, decay_norms=False)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight)}
    assert {id(p) for p in others["params"]} == {id(p) for p in (network[0].bias, *network[1].parameters())}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0)
    assert decayed["lr"] == others["lr"] == 0.1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [0.1 * (1 - step / 4) ** 0.9 for step in range(4)]),
        ({"power": 1.0}, [0.1, 0.075, 0.05, 0.025]),
        ({"schedule": "constant"}, [0.1] * 4),
        ({"schedule": "constant", "warmup": 3}, [0.025, 0.05, 0.075, 0.1]),
        ({"power": 1.0, "warmup": 1}, [0.05, 0.075, 0.05, 0.025]),
    ],
)
def test_schedules(keys, expected):
    _, parts = groups()
    train = TrainConfig(**keys)
    optimizer = make_optimizer(parts, train)
    schedule = make_schedule(optimizer, train, 4)
    found = []
    for _ in expected:
        found.append(rates(optimizer)["lr_head"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected)
    assert rates(optimizer)["lr_head"] == (0.1 if train.schedule == "constant" else 0)


def test_a_group_keeps_to_its_least_rate():
    network = nn.Conv2d(2, 2, 1)
    parts = [
        {"name": "kernel", "lr": 0.1, "params": [network.weight]},
        {"name": "bias", "lr": 0.2, "params": [network.bias], "least_lr": 0.11},
    ]
    train = TrainConfig(power=1.0)
    optimizer = make_optimizer(parts, train)
    schedule = make_schedule(optimizer, train, 4)
    found = []
    for _ in range(5):
        found.append(rates(optimizer))
        optimizer.step()
        schedule.step()
    assert [x["lr_kernel"] for x in found] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    assert [x["lr_bias"] for x in found] == pytest.approx([0.2, 0.15, 0.11, 0.11, 0.11])
