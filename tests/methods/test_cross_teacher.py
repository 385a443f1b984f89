"""Cross teacher training, compared with recordings of the published code."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from child import in_two_processes
from recordings import Recorded, load, method_of, progress, recorded, relative
from torch import nn

from corrmatch.data.datasets import IGNORE
from corrmatch.methods import cross_teacher
from corrmatch.methods.cross_teacher import Bank, high_level, low_level, mix, nearest
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.models.network import Prediction

FILES = recorded("49_cross_teacher_*")


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def without_colours(monkeypatch):
    monkeypatch.setattr(cross_teacher, "recolour", lambda images, *_, **__: images)


@FILES
@pytest.mark.parametrize("mixed", [False, True])
def test_recorded_step(path, monkeypatch, mixed):
    """Both students have the same logits. The labels of each teacher, the mix and both core terms are compared."""
    at, name = load(path), "mix" if mixed else "plain"
    size, other = at["labels"].shape[1:], torch.zeros(2, 7, 9, 11)
    student, labelled = at["student_logits"].clone().requires_grad_(), at["student_logits"].clone().requires_grad_()
    left, right = Recorded(labelled, student), Recorded(other, other)
    method = method_of("cross_teacher", 7, left, right, mix=mixed)
    left.answers, right.answers = list(left.answers), list(right.answers)
    for teacher, logits in zip(method.teachers, (other, at["teacher_logits"]), strict=True):
        teacher.network = Recorded(logits)
    without_colours(monkeypatch)
    monkeypatch.setattr(cross_teacher, "class_mix", lambda *_: at["mix_mask"] == 1)
    nowhere = torch.zeros(2, *size, dtype=torch.bool)
    batch = {
        "labeled": {"image": at["picture"], "label": at["labels"]},
        "unlabeled": {"weak": at["picture"], "ignore": nowhere},
    }
    loss, scalars = method.train()(batch, progress())
    assert relative(left.given[1][0], at["mix_student_input"] if mixed else at["picture"]) < 1e-6
    # The other student has constant logits: its cross-entropy is log 7, and its teacher is confident nowhere.
    assert scalars["x"].item() - torch.tensor(7.0).log().item() == pytest.approx(at["supervised_loss"].item(), rel=1e-5)
    assert scalars["u"].item() == pytest.approx(at[f"{name}_loss"].item(), rel=1e-5)
    loss.backward()
    assert relative(student.grad, at[f"{name}_grad"]) < 1e-4
    assert relative(labelled.grad, at["supervised_grad"]) < 1e-4


@FILES
@pytest.mark.parametrize("mixed", [False, True])
def test_recorded_labels_of_features(path, mixed):
    at, name = load(path), "mix" if mixed else "plain"
    target = PseudoLabels.of(at["teacher_logits"], torch.zeros_like(at["labels"], dtype=torch.bool))
    if mixed:
        _, target = mix(at["picture"], target, at["mix_mask"] == 1)
    assert relative(nearest(target.confidence, (9, 11)), at[f"{name}_confidence_small"]) < 1e-6
    assert torch.equal(nearest(target.labels, (9, 11)).long(), at[f"{name}_labels_small"])


@FILES
@pytest.mark.parametrize("rows", [7, 4096])
def test_recorded_contrast(path, monkeypatch, rows):
    monkeypatch.setattr(cross_teacher, "ROWS", rows)
    at = load(path)
    x, mask = at["feature_left"].requires_grad_(), at["feature_mask"].bool()
    loss = high_level(x, at["feature_labels"], mask, at["bank_left"])
    assert loss.item() == pytest.approx(at["high_loss"].item(), rel=1e-5)
    assert relative(gradient(loss, x), at["high_grad"]) < 1e-4
    joined = torch.cat([at["bank_left"], at["bank_right"]], 1)
    loss = low_level(x, at["feature_right"], at["feature_labels"], mask & at["feature_which"].bool(), joined)
    assert loss.item() == pytest.approx(at["low_loss"].item(), rel=1e-5)
    assert relative(gradient(loss, x), at["low_grad"]) < 1e-4


@FILES
def test_recorded_bank(path):
    at = load(path, "memory_")
    bank = Bank(7, 16, 12)
    bank.entries.copy_(at["start"])
    for call in range(5):
        bank.add(at["logits"][call], at["feature"][call], at["labels"][call], 0.95, 4)
        assert torch.equal(bank.entries, at["bank"][call])
        assert torch.equal(bank.count.int(), at["size"][call])
    assert bank.full == (at["size"][-1] == 16).all()


@FILES
def test_recorded_teachers(path):
    at = load(path, "ema_")

    def state(who, step):
        prefix = f"{who}_"
        found = {name.removeprefix(prefix): x[step] for name, x in at.items() if name.startswith(prefix)}
        return {name.replace("_", ".", 1): x for name, x in found.items()}

    students = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)) for _ in range(2)]
    method = method_of("cross_teacher", 2, *students)
    for teacher in method.teachers:
        teacher.network.load_state_dict(state("teacher", 0), strict=False)
    for step in range(4):
        for student in students:
            student.load_state_dict(state("student", step + 1), strict=False)
        method.after_step(progress(step))
        for teacher in method.teachers:
            for name, expected in state("teacher", step + 1).items():
                torch.testing.assert_close(teacher.network.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


def test_nothing_to_contrast_gives_zero():
    """If no pixel counts, the published code divides by zero."""
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    labels, nowhere, bank = torch.full((2, 3, 3), IGNORE), torch.zeros(2, 3, 3, dtype=torch.bool), torch.randn(3, 5, 4)
    for loss in (high_level(x, labels, nowhere, bank), low_level(x, x.detach(), labels, nowhere, bank)):
        assert loss.item() == 0
        assert not gradient(loss, x).any()


@pytest.mark.parametrize("padding", [False, True])
def test_padding(padding):
    """Padding counts as published, or not at all."""
    method = method_of("cross_teacher", 5, nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), padding=padding)
    target = PseudoLabels(torch.randint(5, (2, 6, 7)), torch.ones(2, 6, 7), torch.rand(2, 6, 7) < 0.3)
    logits = torch.randn(2, 5, 6, 7, requires_grad=True)
    touched = gradient(method.unsupervised(logits, target), logits).abs().sum(1) > 0
    assert torch.equal(touched, torch.ones_like(touched) if padding else target.counted)


def fill_banks(folder, processes):
    """A bank takes three batches of four images, and each process has a part of them. Every process saves its bank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(0)
    bank = Bank(3, 6, 4)
    bank.entries.copy_(torch.randn(3, 6, 4, generator=generator))
    for _ in range(3):
        score, features = (torch.randn(4, c, 5, 5, generator=generator) for c in (3, 4))
        labels = torch.randint(3, (4, 5, 5), generator=generator)
        bank.add(*(x.chunk(processes)[rank] for x in (score, features, labels)), 0.5, 4)
    torch.save(bank.state_dict(), folder / f"{processes}_{rank}.pt")


def run_process(folder):
    dist.init_process_group("gloo")
    fill_banks(folder, 2)
    dist.destroy_process_group()


@pytest.mark.slow
def test_banks_of_two_processes_are_that_of_one(tmp_path):
    fill_banks(tmp_path, 1)
    in_two_processes(__file__, f"run_process(Path({str(tmp_path)!r}))", tmp_path)
    one, *two = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    assert (one["count"] == 6).all()
    for state in two:
        assert torch.equal(state["entries"], one["entries"])
        assert torch.equal(state["count"], one["count"])


def test_one_mix_for_both_students_where_pixels_are_compared(monkeypatch):
    """Without the contrastive terms each student has its own mix, as published."""
    monkeypatch.setattr(cross_teacher, "class_mix", lambda labels, *_: labels > 2)
    without_colours(monkeypatch)
    for contrast in (0.0, 0.1):
        students = [Features() for _ in range(2)]
        method = method_of("cross_teacher", 5, *students, mix=True, contrast=contrast, bank=2)
        images, ignore = torch.randn(2, 3, 6, 7), torch.zeros(2, 6, 7, dtype=torch.bool)
        batch = {"labeled": {"image": images, "label": ignore.long()}, "unlabeled": {"weak": images, "ignore": ignore}}
        method(batch, progress())
        left, right = (student.given[-1] for student in students)
        assert torch.equal(left, right) == (contrast > 0)


class Features(nn.Module):
    """A network of one layer and a classifier."""

    def __init__(self):
        super().__init__()
        self.layer, self.classifier, self.given = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), []

    def forward(self, images, *, correlate=False, features=False):
        self.given.append(images)
        x = self.layer(images)
        return Prediction(self.classifier(x), features=x)
