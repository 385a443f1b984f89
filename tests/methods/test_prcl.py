"""PRCL, compared with recordings of the published code."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from recordings import Recorded, load, method_of, progress, recorded, relative
from torch import nn

from corrmatch.config import TrainConfig
from corrmatch.data.datasets import IGNORE
from corrmatch.methods import prcl
from corrmatch.methods.parts.mixing import with_next
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.methods.prcl import (
    Pixels,
    ProbabilityHead,
    Strong,
    by_class,
    class_chances,
    class_losses,
    draw,
    prototype_sums,
    prototypes,
    score,
    unsupervised,
)
from corrmatch.models.network import Prediction
from corrmatch.training.optimization import make_optimizer, make_schedule, rates


def built(classes, network=None, **options):
    """The method with a network of the published widths, which is enough before training."""
    network = nn.Conv2d(1, 1, 1) if network is None else network
    network.classifier, network.fused_channels = SimpleNamespace(in_channels=256), 256 + 48
    return method_of("prcl", classes, network, **options)


FILES = recorded("44_prcl_*")


def ignored(labels):
    return torch.where(labels < 0, IGNORE, labels)


@FILES
def test_recorded_unsupervised_loss(path):
    """Pixels of probability 1 do not count, and neither does padding."""
    at = load(path, "unsup_")
    logits, labels = at["logits"].requires_grad_(), ignored(at["label"])
    method = built(7)
    loss = unsupervised(logits, labels, method.rate(Strong(logits, labels, at["confidence"])))
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    loss.backward()
    assert relative(logits.grad, at["grad"]) < 1e-4


@FILES
def test_recorded_scores(path):
    at = load(path, "mls_")
    mu = (F.normalize(at[f"mu{i}"], dim=-1) for i in (0, 1))
    first, second = zip(mu, (at["var0"], at["var1"]), strict=True)
    assert relative(score(*first, *second), at["out"]) < 1e-5


def pixels_of(at, prefix=""):
    """Rows in the order of the recorded pixel numbers."""
    rep, var, label, mask = (at[f"{prefix}{name}"] for name in ("rep", "var", "label", "mask"))
    classes = at["class_prob"].shape[0]
    labels = torch.where((mask[:, 0] == 1) & (label >= 0), label, classes)
    hard = labels
    if not prefix:
        own = at["prob"].gather(1, labels.clamp(max=classes - 1).unsqueeze(1))[:, 0]
        hard = torch.where(own < at["strong"], labels, classes)
    mu, variance = (x.movedim(1, -1).flatten(0, 2) for x in (rep, var))
    return Pixels(mu, variance, labels.flatten(), hard.flatten())


@FILES
@pytest.mark.parametrize("case", ["c100_", "c1_", "two_"])
def test_recorded_contrast(path, case, monkeypatch):
    """The contrast from the recorded draws. In the last case a second process has other pixels."""
    at = load(path, case)
    temperature, classes = at["temperature"].item(), at["class_prob"].shape[0]
    for name in ("rep", "var"):
        at[name].requires_grad_()
    pixels = pixels_of(at)
    sums = prototype_sums(pixels, classes)
    if case == "two_":
        sums = sums + prototype_sums(pixels_of(at, "other_"), classes)
    means = prototypes(sums)
    groups, hard = by_class(pixels.labels, classes), by_class(pixels.hard, classes)
    present = groups.size > 0
    assert present.nonzero().flatten().tolist() == at["present"].tolist()
    there = present.unsqueeze(1)
    assert relative(means.mu * there, at["proto_mu"]) < 1e-6
    assert relative(means.variance * there, at["proto_var"]) < 1e-6
    drawn_of = (hard.size > 0).unsqueeze(1)
    assert relative(class_chances(means, present, temperature) * drawn_of, at["class_prob"]) < 1e-6

    anchors, negatives = at["anchors"], at["negatives"]
    assert torch.equal(anchors[:, 0] < 0, hard.size == 0)
    for c in present.nonzero().flatten().tolist():
        if hard.size[c] > 0:
            assert set(anchors[c].tolist()) <= set(hard.order[hard.first[c] :][: hard.size[c]].tolist())
            assert not (pixels.labels[negatives[c]] == c).any()
    drawn = (anchors.clamp(min=0), negatives.clamp(min=0))
    terms = class_losses(pixels, means, *drawn, temperature)
    assert relative(torch.where(hard.size > 0, terms, 0), at["class_loss"]) < 1e-5

    method = built(classes, temperature=temperature)
    monkeypatch.setattr(prcl, "draw", lambda *a: drawn)
    monkeypatch.setattr(prcl, "total", lambda own: sums)
    loss = method.contrast(pixels, None)
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, (at["rep"], at["var"]))
    for name, gradient in zip(("rep", "var"), gradients, strict=True):
        assert relative(gradient, at[f"grad_{name}"]) < 1e-4


@FILES
def test_recorded_head(path):
    at = load(path, "head_")
    head = ProbabilityHead(12, 8, 8)
    names = {
        "fc1": head.first, "fc2": head.second, "gamma": head.gamma, "beta": head.beta,
        "bn1_weight": head.norm.weight, "bn1_bias": head.norm.bias,
    }  # fmt: skip
    norms = {"bn1": head.norm, "bn2": head.plain_norm}
    for name, parameter in names.items():
        parameter.data.copy_(at[name])
    x = at["x"].requires_grad_()
    out = head.train()(x)
    assert relative(out, at["out"]) < 1e-6
    (out * at["r"]).sum().backward()
    for name, leaf in ({"x": x} | names).items():
        assert relative(leaf.grad, at[f"grad_{name}"]) < 1e-4
    for name, norm in norms.items():
        for state in ("running_mean", "running_var"):
            assert relative(getattr(norm, state), at[f"after_{name}_{state}"]) < 1e-6
        for state in ("running_mean", "running_var", "num_batches_tracked"):  # recorded after one step, too
            assert relative(getattr(norm, state), at[f"{name}_{state}"]) < 1e-6
    assert relative(head.eval()(x), at["eval"]) < 1e-6


@FILES
def test_recorded_average(path):
    at = load(path, "ema_")
    student = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    teacher = Teacher(student, 0.99, ramp=True, mode="train", buffers="own")
    teacher.network[1].running_mean.copy_(at["running_mean"])

    def put(network, values):
        nn.utils.vector_to_parameters(values, network.parameters())

    for step, theirs, expected in zip(at["step"].tolist(), at["student"], at["teacher"], strict=True):
        if step == 126:
            put(teacher.network, at["teacher_after_125"])
        put(student, theirs)
        teacher.follow(student, step)
        assert relative(nn.utils.parameters_to_vector(teacher.network.parameters()), expected) < 1e-6
    assert torch.equal(teacher.network[1].running_mean, at["running_mean"])


@FILES
def test_recorded_mix(path):
    at = load(path, "mix_")
    for name in ("image", "label", "confidence"):
        assert torch.equal(with_next(at[name], at["mask"] == 1), at[f"out_{name}"])


@FILES
def test_recorded_schedules(path):
    """Recorded rates are constant within an epoch, and fall with every step here. They are equal at the start of each
    epoch.
    """
    at, epoch_steps = load(path, "sched_"), 10
    method = built(7)
    train = TrainConfig(lr=3.2e-3, lr_multi=1, nesterov=True)
    groups = method.parameter_groups(train)
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in method.probability.parameters()}
    optimizer = make_optimizer(groups, train)
    schedule = make_schedule(optimizer, train, 200 * epoch_steps)
    for epoch in range(200):
        now = progress(epoch * epoch_steps, steps=200 * epoch_steps, epoch_steps=epoch_steps)
        assert method.contrast_weight(now) == pytest.approx(at["lambda"][epoch].item(), rel=1e-9)
        found = rates(optimizer)
        assert found["lr_head"] == pytest.approx(at["lr"][epoch].item(), rel=1e-9)
        assert found["lr_probability"] == pytest.approx(at["lr_prob"][epoch].item(), rel=1e-9)
        for _ in range(epoch_steps):
            optimizer.step()
            schedule.step()


class Given(nn.Module):
    """Returns the recorded outputs, part by part."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def forward(self, x):
        return self.parts.pop(0)


@FILES
def test_recorded_step(path, monkeypatch):
    at = load(path, "step_")
    leaves = {name: at[name].requires_grad_() for name in ("pred_l", "pred_u", "rep", "var")}
    fused = torch.zeros(2, 1, 9, 10)
    network = Recorded(*(Prediction(leaves[name], fused=fused) for name in ("pred_l", "pred_u")))
    method = built(5, network)
    method.teacher.network = Recorded(leaves["pred_u"])
    method.representation, method.probability = Given(*leaves["rep"].split(2)), Given(leaves["var"])
    images, labels = torch.rand(2, 3, 33, 37), ignored(at["label_u"])
    monkeypatch.setattr(prcl, "draw", lambda *a: (at["anchors"].clamp(min=0), at["negatives"].clamp(min=0)))
    monkeypatch.setattr(method, "strong", lambda *a: Strong(images, labels, at["confidence_u"]))
    seen = []
    contrast = method.contrast
    monkeypatch.setattr(
        method, "contrast", lambda pixels, generator: seen.append(pixels) or contrast(pixels, generator)
    )
    batch = {
        "labeled": {"image": images, "label": ignored(at["label_l"])},
        "unlabeled": {"weak": images, "ignore": torch.zeros(2, 33, 37, dtype=torch.bool)},
    }
    now = progress(500, steps=2000, epoch_steps=10)
    loss, scalars = method.train()(batch, now)
    for name, value in {"x": "sup", "u": "unsup", "contrast": "prcl"}.items():
        assert scalars[name].item() == pytest.approx(at[value].item(), rel=1e-5)
    assert method.contrast_weight(now) == pytest.approx(at["lam"].item(), rel=1e-6)
    assert loss.item() == pytest.approx(at["total"].item(), rel=1e-5)
    labels = torch.where((at["mask_small"][:, 0] == 1) & (at["label_small"] >= 0), at["label_small"], 5)
    assert torch.equal(seen[0].labels, labels.flatten())
    means = prototypes(prototype_sums(seen[0], 5))
    chance = class_chances(means, by_class(seen[0].labels, 5).size > 0, 100)
    assert relative(chance * (at["class_prob"].sum(1, keepdim=True) > 0), at["class_prob"]) < 1e-6
    loss.backward()
    for name, leaf in leaves.items():
        assert relative(leaf.grad, at[f"grad_{name}"]) < 1e-4
    assert [given.shape for given, _ in network.given] == [images.shape] * 2
    assert all(training for _, training in [*network.given, *method.teacher.network.given])


def random_pixels(count=400, classes=6, dimensions=16):
    labels = torch.randint(classes + 1, (count,))
    labels[labels == 2] = classes
    hard = torch.where(torch.rand(count) < 0.5, labels, classes)
    hard[hard == 4] = classes
    mu = torch.randn(count, dimensions, requires_grad=True)
    return Pixels(mu, torch.rand(count, dimensions, requires_grad=True), labels, hard)


def test_draws():
    """Anchors are hard pixels of their class. Negatives are pixels of other classes, with the given probabilities."""
    pixels = random_pixels()
    groups, hard = by_class(pixels.labels, 6), by_class(pixels.hard, 6)
    present = groups.size > 0
    assert groups.size.tolist() == [(pixels.labels == c).sum() for c in range(6)]
    means = prototypes(prototype_sums(pixels, 6))
    chance = class_chances(means, present, 0.2)
    anchors, negatives = draw(groups, hard, chance, 1024, 16, torch.Generator().manual_seed(0))
    again = draw(groups, hard, chance, 1024, 16, torch.Generator().manual_seed(0))
    assert torch.equal(anchors, again[0])
    assert torch.equal(negatives, again[1])
    for c in range(6):
        if hard.size[c] > 0:
            assert set(anchors[c].tolist()) == set((pixels.hard == c).nonzero().flatten().tolist())
        if present[c]:
            found = pixels.labels[negatives[c]]
            assert (found != c).all()
            share = torch.bincount(found.flatten(), minlength=6)[:6] / found.numel()
            torch.testing.assert_close(share, chance[c], rtol=0, atol=0.03)
    assert not chance[:, 2].any()


def test_nothing_to_contrast():
    """With no class or one class the loss is 0. Gradients exist and are 0."""
    method = built(6, anchors=4, negatives=8)
    for label in (6, 3):
        labels = torch.full((50,), label)
        pixels = random_pixels(50)._replace(labels=labels, hard=labels)
        loss = method.contrast(pixels, torch.Generator().manual_seed(0))
        loss.backward()
        assert loss.item() == 0
        assert not pixels.mu.grad.any()
        assert not pixels.variance.grad.any()


def test_one_class_at_a_time():
    """The backward keeps no tensor of anchors x negatives x channels."""
    pixels, kept = random_pixels(), []
    means = prototypes(prototype_sums(pixels, 6))
    anchors, negatives = torch.randint(400, (6, 32)), torch.randint(400, (6, 32, 64))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = class_losses(pixels, means, anchors, negatives, 1.0).sum()
    assert max(kept) < 32 * 64 * 16
    loss.backward()
    assert pixels.mu.grad.isfinite().all()


def test_the_head_stays_finite():
    """The variance is finite even if a channel is very far from its mean."""
    head = ProbabilityHead(3, 4, 5)
    head.gamma.data.fill_(1e4)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    out = head(x)
    out.sum().backward()
    assert (out > 0).all()
    assert (out <= 1).all()
    assert x.grad.isfinite().all()


def test_strong_views_keep_what_belongs_together():
    """Labels are a function of the image's brightness, also after scaling, mixing and mirroring."""
    method = built(2, scale=1.0)
    images = torch.zeros(4, 3, 40, 40)
    images[:, :, :, 20:] = 1
    labels = (images[:, 0] > 0.5).long()

    padding = torch.zeros(4, 40, 40, dtype=torch.bool)
    padding[:, :3] = True
    pseudo = PseudoLabels(labels, 0.9 + 0.05 * labels, padding)
    strong = method.strong(images, pseudo, torch.Generator().manual_seed(5))
    counted = strong.labels != IGNORE
    assert torch.equal(counted, strong.confidence > 0)
    torch.testing.assert_close(strong.confidence[counted], 0.9 + 0.05 * strong.labels[counted].float())
    bright, dark = (strong.images.mean(1)[counted & (strong.labels == c)].median() for c in (1, 0))
    assert bright > dark
    assert 0.2 < counted.float().mean() < 0.95


def test_weight_falls_to_exp_minus_five():
    method = built(2, weight=0.5)
    assert method.contrast_weight(progress(0)) == 0.5
    assert method.contrast_weight(progress(99, epoch_steps=1)) == pytest.approx(0.5 * math.exp(-5 * 0.99**2))
