"""The CutMix mean teacher with colour augmentation, compared with recordings of the published code."""

from __future__ import annotations

import pytest
import torch
from recordings import Recorded, load, method_of, progress, recorded, relative
from torch import nn

from corrmatch.data.boxes import half_box, log_uniform_box
from corrmatch.methods.color_augmentation import pixel_distance
from corrmatch.methods.parts.teacher import Teacher

FILES = recorded("43_colour_augmentation_*")


def mixed(at):
    """The teacher's logits and probabilities of the mixed pair."""
    target = torch.where(at["mask"] == 1, at["teacher_logits_1"], at["teacher_logits_0"])
    return target, target.softmax(1)


@FILES
@pytest.mark.parametrize("per_pixel", [False, True])
def test_recorded_consistency(path, per_pixel):
    at, suffix = load(path), "_per_pixel" if per_pixel else ""
    target, q = mixed(at)
    assert relative(q, at["teacher_prob"]) < 1e-6
    method = method_of("color_augmentation", 21, nn.Conv2d(1, 1, 1), frozen_norms=False, per_pixel=per_pixel)
    student = at["student_logits"].requires_grad_()
    loss = method.consistency(student, q, target, at["mixed_valid"][:, 0])
    assert loss.item() == pytest.approx(at[f"loss_var{suffix}"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert relative(gradient, at[f"grad_var{suffix}"]) < 1e-4


@FILES
@pytest.mark.parametrize(("kind", "name"), [("kl", "kld"), ("binary", "bce"), ("logits", "logits_var")])
def test_recorded_distances(path, kind, name):
    at = load(path)
    target, q = mixed(at)
    method = method_of("color_augmentation", 21, nn.Conv2d(1, 1, 1), frozen_norms=False, distance=kind)
    student = at["student_logits"].requires_grad_()
    loss = method.consistency(student, q, target, at["mixed_valid"][:, 0])
    assert loss.item() == pytest.approx(at[f"loss_{name}"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    if f"grad_{name}" in at:
        assert relative(gradient, at[f"grad_{name}"]) < 1e-4
    assert pixel_distance(student, q, target, kind).shape == q[:, 0].shape


@FILES
def test_recorded_step(path):
    """The mixed images, their logits, and the supervised term. Padding is left out: here it is whole pixels."""
    at = load(path)
    student, labelled = at["student_logits"].clone(), at["student_logits"].requires_grad_()
    network, box = Recorded(labelled, student), at["mask"][:, 0] == 1
    method = method_of("color_augmentation", 21, network, frozen_norms=False)
    method.teacher.network = Recorded(at["teacher_logits_0"], at["teacher_logits_1"])
    nowhere, weak = torch.zeros_like(box), torch.zeros_like(at["image_0"])
    batch = {"labeled": {"image": weak, "label": at["labels"]}}
    for i, name in enumerate(("unlabeled", "mix")):
        strong = at[f"image_{i}"].unsqueeze(1)
        batch[name] = {"weak": weak, "strong": strong, "box": box.unsqueeze(1), "ignore": nowhere}
    loss, scalars = method(batch, progress())
    assert relative(network.given[1][0], at["mixed_image"]) < 1e-6
    assert scalars["confident"].item() == pytest.approx(at["confidence_rate"].item(), rel=1e-6)
    assert scalars["x"].item() == pytest.approx(at["loss_supervised"].item(), rel=1e-5)
    loss.backward()
    assert relative(labelled.grad, at["grad_supervised"]) < 1e-4
    target, q = mixed(at)
    expected = scalars["x"] + method.consistency(student, q, target, ~nowhere)
    torch.testing.assert_close(loss.detach(), expected.detach())


@FILES
def test_recorded_boxes(path):
    at = load(path)
    for suffix, size in (("", (17, 19)), ("_321", (321, 321))):
        for i, (aspect, place) in enumerate(zip(at[f"draw_aspect{suffix}"], at[f"draw_place{suffix}"], strict=True)):
            box = log_uniform_box(size, 0.5, aspect.item(), tuple(place[0].tolist()))
            if suffix:
                assert list(box) == at["box_321"][i].tolist()
            else:
                expected = torch.zeros(size)
                expected[box[0] : box[2], box[1] : box[3]] = 1
                assert torch.equal(expected, at["mask"][i, 0])


@FILES
def test_recorded_average(path):
    at = load(path)

    def state(who, step):
        prefix = f"ema_{who}_"
        return {
            name.removeprefix(prefix).replace("_", ".", 1): x[step] for name, x in at.items() if name.startswith(prefix)
        }

    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    student.load_state_dict(state("student", 0))
    teacher = Teacher(student, 0.99, mode="train", buffers="average")
    teacher.network.load_state_dict(state("teacher", 0))
    for step in range(1, 4):
        student.load_state_dict(state("student", step))
        teacher.follow(student, step - 1)
        expected = state("teacher", step)
        for name, x in teacher.network.state_dict().items():
            torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-7)


def test_modes():
    """Norm layers of both backbones keep their statistics. The teacher has no dropout unless a key sets it."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
            self.head = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout2d(0.5))

    for dropout in (False, True):
        method = method_of("color_augmentation", 2, Network(), teacher_dropout=dropout).train()
        for network, on in ((method.model, True), (method.teacher.network, dropout)):
            assert not network.backbone[1].training
            assert network.head[0].training
            assert network.head[1].training == on
        assert not any(module.training for module in method.eval().model.modules())


def test_half_boxes():
    areas = [half_box((64, 48)).float().mean().item() for _ in range(50)]
    assert min(areas) > 0.47
    assert max(areas) < 0.53
