"""The losses that several methods use, each compared with its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recordings import load, recorded, relative

from corrmatch.data.datasets import IGNORE
from corrmatch.methods.parts import losses


@pytest.fixture
def pixels():
    labels = torch.randint(5, (2, 6, 7))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    return torch.randn(2, 5, 6, 7, dtype=torch.float64).float().requires_grad_(), labels


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def test_cross_entropy_is_that_of_torch(pixels):
    logits, labels = pixels
    ours, theirs = losses.supervised(logits, labels), F.cross_entropy(logits, labels, ignore_index=IGNORE)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(3 * ours, logits), gradient(3 * theirs, logits))


def test_divergence_is_that_of_torch(pixels):
    logits, _ = pixels
    weak, (reliable, counted) = torch.randn_like(logits), torch.rand(2, 2, 6, 7) < 0.6
    ours = losses.consistency(logits, weak, reliable, counted)
    pixel = F.kl_div(logits.log_softmax(1), weak.softmax(1), reduction="none").sum(1)
    theirs = (pixel * reliable).sum() / counted.sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


def test_gradients_of_half_precision_logits_have_their_dtype(pixels):
    logits = pixels[0].detach().bfloat16().requires_grad_()
    loss = losses.supervised(logits, pixels[1])
    assert loss.dtype == torch.float32
    assert gradient(loss, logits).dtype == torch.bfloat16


def test_unlikely_labels_have_a_finite_loss():
    logits = torch.tensor([0.0, 500.0]).view(1, 2, 1, 1).requires_grad_()
    loss = losses.supervised(logits, torch.zeros(1, 1, 1, dtype=torch.long))
    assert loss.item() == 500
    assert gradient(loss, logits).flatten().tolist() == [-1, 1]


def test_nothing_that_counts_gives_zero(pixels):
    logits, labels = pixels
    nothing = torch.zeros(labels.shape, dtype=torch.bool)
    for loss in (
        losses.supervised(logits, torch.full_like(labels, IGNORE)),
        losses.supervised(logits, torch.full_like(labels, IGNORE), hard_pixels=100),
        losses.pseudo_supervised(logits, labels, nothing, nothing),
        losses.consistency(logits, logits.detach(), nothing, nothing),
    ):
        assert loss.item() == 0
        assert not gradient(loss, logits).any()


def test_hard_pixels():
    """Two classes, whose labels have probabilities of 0.1 to 0.9. At least the given number of pixels counts, and all
    below 0.7.
    """
    probability = torch.arange(1, 10) / 10
    logits = torch.stack([probability, 1 - probability]).log().view(1, 2, 3, 3)
    truth = torch.zeros(1, 3, 3, dtype=torch.long)
    truth[0, 0, 1] = IGNORE  # 0.2

    def kept(pixels):
        counted = losses.hard(logits, truth, pixels) & (truth != IGNORE)
        return [round(p, 1) for p in probability[counted.flatten()].tolist()]

    below = [0.1, 0.3, 0.4, 0.5, 0.6]
    assert kept(2)[: len(below)] == below
    assert kept(2)[len(below) :] in ([], [0.7])  # 0.7 itself is within rounding
    assert kept(7) == [*below, 0.7, 0.8]
    assert kept(1000) == [*below, 0.7, 0.8, 0.9]
    expected = -torch.tensor([*below, 0.7, 0.8]).log().mean()
    torch.testing.assert_close(losses.supervised(logits, truth, hard_pixels=7), expected)


@recorded("ohem_*")
@pytest.mark.parametrize("case", ["kept_below", "kept_above", "few_valid"])
def test_recorded_hard_pixels(path, case):
    at = load(path, f"{case}_")
    logits = at["logits"].requires_grad_()
    loss = losses.supervised(logits, at["label"].long(), hard_pixels=int(at["min_kept"]))
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    assert relative(gradient(loss, logits), at["grad"]) < 1e-4
