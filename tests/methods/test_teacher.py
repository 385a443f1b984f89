"""Averaged networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from corrmatch.methods.parts.teacher import Teacher


@pytest.fixture
def student():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def move(student):
    with torch.no_grad():
        for x in (*student.parameters(), student[1].running_mean, student[1].running_var):
            x.add_(torch.rand_like(x))
        student[1].num_batches_tracked += 1


@pytest.mark.parametrize("buffers", ["copy", "average", "own"])
def test_buffers(student, buffers):
    teacher = Teacher(student, 0.75, buffers=buffers)
    before = {name: x.clone() for name, x in teacher.network.state_dict().items()}
    move(student)
    teacher.follow(student, 5)
    for name, x in student.state_dict().items():
        mean = 0.75 * before[name] + 0.25 * x
        counter, statistic = name.endswith("tracked"), "running" in name
        expected = {"copy": x, "average": before[name] if counter else mean, "own": before[name]}[buffers]
        torch.testing.assert_close(teacher.network.state_dict()[name], expected if counter or statistic else mean)


def test_a_ramp_starts_with_a_copy_and_ends_at_the_decay(student):
    teacher = Teacher(student, 0.7, ramp=True)
    for step, decay in enumerate([0, 1 / 2, 2 / 3, 0.7, 0.7]):
        before = teacher.network[0].weight.clone()
        move(student)
        teacher.follow(student, step)
        torch.testing.assert_close(teacher.network[0].weight, decay * before + (1 - decay) * student[0].weight)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_mode_is_its_own(student, mode):
    teacher = Teacher(student, 0.9, mode=mode)
    whole = nn.ModuleList([student, teacher])
    for asked in (True, False):
        whole.train(asked)
        assert student.training == asked
        assert {module.training for module in teacher.network.modules()} == {mode == "train"}


def test_it_takes_no_gradient_and_becomes_the_student(student):
    teacher = Teacher(student, 0.9)
    assert not teacher(torch.randn(1, 1, 3, 3, requires_grad=True)).requires_grad
    move(student)
    teacher.copy_from(student)
    assert all(map(torch.equal, teacher.network.state_dict().values(), student.state_dict().values()))


def test_what_it_can_be(student):
    with pytest.raises(ValueError, match="mode, buffers: expected one of"):
        Teacher(student, 0.9, mode="evaluation")
