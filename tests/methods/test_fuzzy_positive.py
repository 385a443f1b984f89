"""Fuzzy positive learning, compared with recordings of the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recordings import Recorded, load, method_of, progress, recorded, relative

from corrmatch.data.boxes import toggled_boxes
from corrmatch.methods.fuzzy_positive import WEIGHTS, balanced, fuzzy_losses, fuzzy_pixels, fuzzy_positives

FILES = recorded("42_fpl_*")


def mixed(at, network):
    return torch.where(at["mask"] == 1, at[f"teacher{network}_logits_1"], at[f"teacher{network}_logits_0"])


@FILES
def test_recorded_pixels(path):
    at = load(path)
    for name, student, teacher in (("pixels12", 1, 2), ("pixels21", 2, 1)):
        wanted = fuzzy_positives(mixed(at, teacher), 0.9, 3, "none")
        assert relative(mixed(at, teacher), at[f"mixed_logits_{teacher}"]) < 1e-6
        assert relative(fuzzy_pixels(at[f"student{student}_logits"], wanted.positive), at[name]) < 1e-5
        assert 1 < wanted.positive.sum(1).float().mean() < 3


@FILES
@pytest.mark.parametrize("weight", WEIGHTS)
def test_recorded_loss(path, weight):
    at = load(path)
    students = [at[f"student{i}_logits"].requires_grad_() for i in (1, 2)]
    counted = torch.ones(2, 17, 19, dtype=torch.bool)
    pairs = []
    for student, teacher in zip(students, (2, 1), strict=True):
        wanted = fuzzy_positives(mixed(at, teacher), 0.9, 3, weight)
        if weight != "none":
            assert relative(wanted.weight, at[f"weight{3 - teacher}{teacher}_{weight}"]) < 1e-5
        pairs.append(fuzzy_losses(student, wanted, counted))
    loss, plain = balanced(pairs), pairs[0][1] + pairs[1][1]
    assert loss.item() == pytest.approx(at[f"loss_{weight}"].item(), rel=1e-5)
    assert plain.item() == pytest.approx(at["loss_ce"].item(), rel=1e-5)
    balance = plain / (pairs[0][0] + pairs[1][0])
    assert balance.item() == pytest.approx(at[f"balance_{weight}"].item(), rel=1e-5)
    loss.backward()
    for i, student in enumerate(students, start=1):
        if f"grad{i}_{weight}" in at:
            assert relative(student.grad, at[f"grad{i}_{weight}"]) < 1e-4


@FILES
def test_recorded_step(path):
    """The whole step. Each network labels for the other one, with its logits of the images before they are mixed."""
    at = load(path)
    students = [at[f"student{i}_logits"].requires_grad_() for i in (1, 2)]
    known = torch.zeros(2, 19, 17, 19)
    networks = [
        Recorded(at[f"teacher{i}_logits_0"], at[f"teacher{i}_logits_1"], known, students[i - 1]) for i in (1, 2)
    ]
    method = method_of("fuzzy_positive", 19, *networks)
    box, images = at["mask"] == 1, torch.zeros(2, 3, 17, 19)
    nowhere = torch.zeros(2, 17, 19, dtype=torch.bool)
    batch = {
        "labeled": {"image": images, "label": torch.full((2, 17, 19), 255)},
        "unlabeled": {"weak": images, "ignore": nowhere, "box": box},
        "mix": {"weak": images, "ignore": nowhere},
    }
    loss, scalars = method(batch, progress())
    loss.backward()
    assert scalars["cross"].item() == pytest.approx(at["loss_concave"].item(), rel=1e-5)
    for i, student in enumerate(students, start=1):
        assert relative(student.grad, at[f"grad{i}_concave"]) < 1e-4


@FILES
@pytest.mark.parametrize("sampled", [False, True])
def test_recorded_loss_of_the_other_host(path, sampled):
    """AEL multiplies the same F and weight by a confidence. The factors are those of the package; the test writes their
    sum.
    """
    at = load(path)
    student, teacher = at["student2_logits"].requires_grad_(), at["mixed_logits_1"]
    wanted = fuzzy_positives(teacher, 0.9, 3, "concave")
    keep = torch.ones_like(wanted.weight, dtype=torch.bool)
    if sampled:
        unsure = 1 - at["ael_category_confidence"]
        rate = unsure / unsure.max()
        predicted = student.argmax(1)
        keep = at["ael_random"].expand(2, -1, -1, -1).gather(1, predicted.unsqueeze(1))[:, 0] > 1 - rate[predicted]
    omega = teacher.softmax(1).amax(1).square() * keep
    omega = omega / omega.sum()
    pixels = wanted.weight * fuzzy_pixels(student, wanted.positive)
    beta = F.cross_entropy(student, wanted.labels) / pixels.mean()
    loss = (omega * beta.detach() * pixels).sum()
    name = "ael_sample" if sampled else "ael"
    assert loss.item() == pytest.approx(at[f"{name}_loss"].item(), rel=1e-5)
    loss.backward()
    assert relative(student.grad, at[f"{name}_grad"]) < 1e-4


def test_one_positive_is_cross_entropy():
    logits, teacher = torch.randn(2, 5, 4, 4), 50 * torch.randn(2, 5, 4, 4)
    wanted = fuzzy_positives(teacher, 0.5, 2, "none")
    assert (wanted.positive.sum(1) == 1).all()
    expected = F.cross_entropy(logits, teacher.argmax(1), reduction="none")
    torch.testing.assert_close(fuzzy_pixels(logits, wanted.positive), expected)


def test_positives_need_more_classes():
    with pytest.raises(ValueError, match="positives: expected fewer than the 3 classes, got 3"):
        fuzzy_positives(torch.randn(1, 3, 2, 2), 0.9, 3, "none")


def test_an_exactly_solved_batch_has_no_balance():
    zero = torch.zeros((), requires_grad=True)
    loss = balanced([(0 * zero, torch.zeros(())), (0 * zero, torch.zeros(()))])
    loss.backward()
    assert loss.item() == zero.grad.item() == 0


def test_toggled_boxes_cancel():
    shares = torch.tensor([toggled_boxes((60, 60)).float().mean() for _ in range(200)])
    assert shares.min() > 0.02
    assert shares.max() <= 0.52
    assert 0.2 < shares.mean() < 0.4
