"""The loss: two recorded training steps of the published implementation, and each term against its definition."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import FILES, load, relative, unpack

from corrmatch import RegionMasks, nn, ops
from corrmatch.training import losses
from corrmatch.training.losses import IGNORE, Outputs
from corrmatch.training.targets import PseudoLabels, make_targets

STEPS = [name for name in FILES if name.startswith("step")]
PRINTED = {"Total loss": "total", "Loss x": "x", "loss_corr_ce": "x_corr", "Loss s": "s", "Loss w_fp": "fp",
           "loss_corr_u": "corr"}  # fmt: skip
LEAVES = ("out_w", "fp_w", "corr_w", "out_s", "corr_s")


def run_step(at, theta):
    """The recorded outputs as leaves, targets, terms and total of one recorded step."""
    leaves = {name: at[name].float().requires_grad_() for name in LEAVES}
    out, perturbed, propagated, strong, strong_propagated = leaves.values()
    pictures, truth = at["ignore"].shape[0], at["mask_x"]
    labeled, unlabeled = slice(None, pictures), slice(pictures, None)
    outputs = Outputs(
        out[labeled], propagated[labeled], out[unlabeled], perturbed[unlabeled], propagated[unlabeled], strong,
        strong_propagated,
    )  # fmt: skip
    mix = PseudoLabels(*ops.pseudo_label(at["out_mix"].float())[:2], at["ignore_mix"] == IGNORE)
    masks = RegionMasks.from_bool(unpack(at, "masks")[pictures:])
    targets = make_targets(outputs.weak, mix, at["ignore"] == IGNORE, at["cutmix"] == 1, masks, theta, truth)
    parts = losses.terms(outputs, targets)
    return leaves, targets, parts, losses.total(parts)


@pytest.mark.parametrize("name", STEPS)
def test_recorded_steps(name):
    vectors = load(name)
    theta = nn.DynamicThreshold(0.85 if "voc" in name else 0.6)
    history = []
    for step in ("t0_", "t1_"):
        at = {key.removeprefix(step): value for key, value in vectors.items() if key.startswith(step)}
        leaves, targets, parts, total = run_step(at, theta)
        assert parts["x"].item() == pytest.approx(at["loss_x"].item(), rel=1e-5)
        assert parts["x_corr"].item() == pytest.approx(at["loss_x_corr"].item(), rel=1e-5)
        assert theta.threshold.item() == pytest.approx(at["threshold"].item(), abs=1e-6)
        assert torch.equal(targets.weak_labels, at["labels_weak"].long())
        assert torch.equal(targets.labels, at["labels_after"].long())
        total.backward()
        for recorded, leaf in leaves.items():
            assert relative(leaf.grad, at[f"grad_{recorded}"]) < 1e-4, recorded

        history.append({n: part.item() for n, part in (parts | {"total": total}).items()})
        means = {n: np.mean([past[n] for past in history]) for n in history[0]}
        printed = printed_losses(name, step)
        assert {n: round(means[n], 3) for n in printed} == pytest.approx(printed, abs=1.01e-3)
    assert len(history) == 2


def printed_losses(name, step):
    """The running means that the published implementation printed, to three decimals."""
    with np.load(FILES[name]) as file:
        found = re.findall(r"([A-Za-z_]+(?: [a-z_]+)?): ([\d.]+)", str(file[f"{step}printed"]))
    return {PRINTED[term]: float(value) for term, value in found if term in PRINTED}


def test_the_threshold_sees_weak_logits_outside_the_mixed_padding():
    """Three pixels of one class: padding of the pasted picture, padding of the weak one under the box, neither."""
    confidence = torch.tensor([0.99, 0.95, 0.9])
    logits = torch.stack([confidence, 1 - confidence]).log().view(1, 2, 1, 3)
    box, weak_padding, mix_padding = (torch.tensor(x).bool().view(1, 1, 3) for x in ([1, 1, 0], [0, 1, 0], [1, 0, 0]))
    mix = PseudoLabels(torch.zeros(1, 1, 3, dtype=torch.long), torch.zeros(1, 1, 3), mix_padding)
    masks = RegionMasks.from_bool(torch.zeros(1, 1, 1, 3, dtype=torch.bool))
    theta = nn.DynamicThreshold(0.5, momentum=0.0)
    targets = make_targets(logits, mix, weak_padding, box, masks, theta, torch.zeros(0, 1, 3))
    assert theta.threshold.item() == pytest.approx(0.95)
    assert targets.counted.flatten().tolist() == [False, True, True]
    assert targets.weak_counted.flatten().tolist() == [True, False, True]
    assert targets.weak_reliable.flatten().tolist() == [True, False, False]
    assert not targets.reliable_before.any()


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
        losses.supervised(logits, torch.full_like(labels, IGNORE), ohem=True),
        losses.pseudo_supervised(logits, labels, nothing, nothing),
        losses.consistency(logits, logits.detach(), nothing, nothing),
    ):
        assert loss.item() == 0
        assert not gradient(loss, logits).any()


def test_hard_pixels(monkeypatch):
    """Two classes whose label has probability 0.1 to 0.9: at least so many pixels, and all below 0.7."""
    probability = torch.arange(1, 10) / 10
    logits = torch.stack([probability, 1 - probability]).log().view(1, 2, 3, 3)
    truth = torch.zeros(1, 3, 3, dtype=torch.long)
    truth[0, 0, 1] = IGNORE  # 0.2

    def kept(pixels):
        monkeypatch.setattr(losses, "OHEM_PIXELS", pixels)
        counted = losses.hard(logits, truth) & (truth != IGNORE)
        return [round(p, 1) for p in probability[counted.flatten()].tolist()]

    below = [0.1, 0.3, 0.4, 0.5, 0.6]
    assert kept(2)[: len(below)] == below
    assert kept(2)[len(below) :] in ([], [0.7])  # 0.7 itself is within rounding
    assert kept(7) == [*below, 0.7, 0.8]
    assert kept(1000) == [*below, 0.7, 0.8, 0.9]
    expected = -torch.tensor([*below, 0.7, 0.8]).log().mean()
    monkeypatch.setattr(losses, "OHEM_PIXELS", 7)
    torch.testing.assert_close(losses.supervised(logits, truth, ohem=True), expected)
