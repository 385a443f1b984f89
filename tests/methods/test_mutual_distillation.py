"""Mutual knowledge distillation, compared with recordings of the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recordings import Recorded, load, method_of, progress, recorded, relative
from torch import nn
from torchvision import tv_tensors

from corrmatch.config import PropagationConfig
from corrmatch.data.boxes import box_mask, log_uniform_box
from corrmatch.data.datasets import IGNORE
from corrmatch.data.views import Geometry, normalize, seeded
from corrmatch.methods.mutual_distillation import ONE_OF_FIVE, ClassVariances, half
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import nearest
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.methods.parts.threshold import StepThreshold
from corrmatch.models.network import Prediction

FILES = recorded("46_mutual_distillation_*")
PARTS = ("sup", "unsup")
STUDENTS, TEACHERS = ("branch1", "branch2"), ("teacher1", "teacher2")


def answer(at, network, part):
    return Prediction(at[f"{network}_{part}_logits"], features=at[f"{network}_{part}_features"])


def recorded_network(at, name, *answers):
    network = Recorded(*answers)
    network.classifier = nn.Conv2d(8, 6, 1)
    network.classifier.weight.data = at[f"{name}_weight"][..., None, None]
    return network


@FILES
@pytest.mark.parametrize("prefix", ["", "p_"])
def test_recorded_steps(path, prefix):
    """Two steps in a row, without a threshold and with one."""
    at, method = load(path, prefix), None
    threshold = max(0.0, at["threshold"].item())
    for number in (0, 1):
        now = load(path, f"{prefix}st{number}_")
        leaves = {f"{b}_{part}": now[f"{b}_{part}_logits"].requires_grad_() for b in STUDENTS for part in PARTS}
        networks = [recorded_network(at, name, *(answer(now, name, part) for part in PARTS))
                    for name in STUDENTS]  # fmt: skip
        if method is None:
            method = method_of("mutual_distillation", 6, *networks, threshold=threshold)
        method.model, method.peer = networks
        for teacher, name in zip((method.teacher, method.peer_teacher), TEACHERS, strict=True):
            teacher.network = recorded_network(at, name, *(answer(now, name, part) for part in PARTS))
        images, truth, mask = torch.rand(3, 3, 64, 64), now["gt"][:, 0], now["mask"][:, 0] == 1
        strong = torch.rand(3, 1, 3, 64, 64)
        batch = {
            "labeled": {"image": images[:2], "label": truth},
            "unlabeled": {"weak": images, "strong": strong, "box": mask.unsqueeze(1), "ignore": ~mask & mask},
        }
        loss, scalars = method.train()(batch, progress(int(now["iteration"]) - 1, steps=30_000))
        known = sum(method.supervised(leaves[f"{b}_sup"], truth) for b in STUDENTS)
        assert scalars["x"].item() == pytest.approx(known.item(), rel=1e-6)
        mutual = loss - known  # the recordings have no supervised term
        assert mutual.item() == pytest.approx(now["loss"].item(), rel=1e-5)
        mutual.backward()
        for name, leaf in leaves.items():
            assert relative(leaf.grad, now[f"{name}_grad"]) < 1e-4
        for name, statistics in zip((*STUDENTS, *TEACHERS), method.statistics, strict=True):
            for state in ("covariance", "mean", "amount"):
                assert relative(getattr(statistics, state), now[f"{name}_{state}"]) < 1e-6
        for network in (*networks, method.teacher.network, method.peer_teacher.network):
            assert torch.equal(network.given[0][0], images[:2])
            assert all(training for _, training in network.given)
        assert torch.equal(method.teacher.network.given[1][0], images)
        expected = torch.where(now["mask"] == 1, strong[:, 0], strong[[1, 2, 0], 0])
        assert torch.equal(networks[0].given[1][0], expected)


@FILES
def test_recorded_ratio(path, monkeypatch):
    """The recorded rho equals that of the method."""
    found = []
    shift = ClassVariances.shift
    monkeypatch.setattr(ClassVariances, "shift", lambda *a: found.append(a[-1]) or shift(*a))
    for prefix in ("st0_", "st1_", "p_st0_", "p_st1_"):
        at, now = load(path), load(path, prefix)
        pairs = [recorded_network(at, n, answer(now, n, "sup"), answer(now, n, "unsup")) for n in STUDENTS]
        method = method_of("mutual_distillation", 6, *pairs)
        mask = now["mask"] == 1
        images = torch.zeros(3, 3, 64, 64)
        batch = {
            "labeled": {"image": images, "label": now["gt"][:, 0]},
            "unlabeled": {"weak": images, "strong": images[:, None], "box": mask, "ignore": mask[:, 0]},
        }
        method(batch, progress(int(now["iteration"]) - 1, steps=30_000))
        assert found == pytest.approx([now["ratio"].item()] * 8, rel=1e-6)
        found.clear()


@FILES
def test_recorded_statistics(path):
    at = load(path)
    statistics = ClassVariances(6, 8)
    for number, (features, labels) in enumerate(zip(at["es_features"], at["es_labels"], strict=True)):
        statistics.update(features.T.reshape(1, 8, 5, 8), labels.view(1, 5, 8))
        for state in ("covariance", "mean", "amount"):
            assert relative(getattr(statistics, state), at[f"es_{state}"][number]) < 1e-6


@FILES
def test_recorded_augmentation(path):
    at = load(path)
    statistics = ClassVariances(6, 8)
    statistics.covariance.copy_(at["au_covariance"])
    shift = statistics.shift(at["au_weight"], at["au_labels"].view(1, 4, 5), at["au_ratio"].item())
    assert relative(at["au_preds"] + shift[0].flatten(1).T, at["au_out"]) < 1e-6


@FILES
def test_recorded_decay(path):
    """The recorded decay of a step is that of the update after the step before."""
    at, method = load(path), method_of("mutual_distillation", 6, *(recorded_network(load(path), n) for n in STUDENTS))
    for number, expected in zip(at["sc_iterations"].tolist(), at["sc_momentum"], strict=True):
        for network, teacher in ((method.model, method.teacher), (method.peer, method.peer_teacher)):
            nn.init.zeros_(network.classifier.weight)
            nn.init.ones_(teacher.network.classifier.weight)
        if number > 1:
            method.after_step(progress(number - 2))  # the step before
        else:
            method.teacher.follow(method.model, 0)
        left = method.teacher.network.classifier.weight[0, 0].item()
        assert left == pytest.approx(expected.item(), rel=1e-6)


@FILES
def test_recorded_average(path):
    """Parameters are averaged. Running statistics are not."""
    at = load(path)

    def state(prefix):
        return {name.removeprefix(prefix): x for name, x in at.items() if name.startswith(prefix)}

    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    teacher = Teacher(student, 0.6, ramp=True, mode="train", buffers="own")
    student.load_state_dict(state("em_student_"), strict=False)
    teacher.network.load_state_dict(state("em_before_"), strict=False)
    teacher.follow(student, 100)
    found = teacher.network.state_dict()
    for name, expected in state("em_after_").items():
        assert relative(found[name], expected) < 1e-6
    assert torch.equal(found["1.running_mean"], at["em_before_1.running_mean"])


@FILES
def test_recorded_boxes(path):
    at, mask = load(path), False
    size = tuple(at["bx_size"].tolist())
    draws = zip(at["bx_area_f64"].tolist(), at["bx_u_height_f64"].tolist(), at["bx_u_place_f64"].tolist(), strict=True)
    for area, aspect, place in draws:
        mask = mask ^ box_mask(size, log_uniform_box(size, area, aspect, place, (1 / 3) ** 0.5))
    assert torch.equal(mask, at["bx_mask"] == 1)


def test_statistics_of_many_updates_are_those_of_all_pixels():
    """Features are far from zero, where float32 squares would lose the variance."""
    features, labels = 100 + 0.1 * torch.randn(6, 3, 7, 9), torch.randint(4, (6, 7, 9))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    labels[labels == 2] = 1
    statistics = ClassVariances(4, 3)
    for part in range(0, 6, 2):
        statistics.update(features[part : part + 2], labels[part : part + 2])
    for c in range(4):
        rows = features.double().movedim(1, -1)[labels == c]
        assert statistics.amount[c] == len(rows)
        if len(rows):
            torch.testing.assert_close(statistics.mean[c], rows.mean(0).float())
            torch.testing.assert_close(statistics.covariance[c], rows.var(0, correction=0).float(), rtol=1e-3, atol=0)
        else:
            assert not statistics.mean[c].any()
            assert not statistics.covariance[c].any()


def test_half_is_bilinear():
    x = torch.randn(2, 3, 13, 16)
    torch.testing.assert_close(half(x), F.interpolate(x, scale_factor=0.5, mode="bilinear"))


class Little(nn.Module):
    """A network with logits and features at stride 4, query and key at stride 8."""

    def __init__(self):
        super().__init__()
        self.stem, self.classifier, self.map = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 2, 2)

    def forward(self, images, *, correlate=False, features=False):
        found = self.stem(images)
        pair = self.map(found) if correlate else None
        return Prediction(self.classifier(found), None, pair, pair, found if features else None)


@pytest.mark.parametrize("threshold", [0.0, 0.99])
def test_regions_rewrite_targets_of_mixed_images_alone(threshold):
    method = method_of("mutual_distillation", 6, Little(), Little(), threshold=threshold)
    method.propagation = Propagation(PropagationConfig(head=True, regions=True, num_masks=8))
    q, mask = torch.randint(6, (5, 4, 4)), torch.rand(3, 32, 32) < 0.5
    out = method.model(torch.randn(3, 3, 32, 32), correlate=True)

    def rewritten(theta):
        method.theta = StepThreshold(6, theta, 1)
        return method.through_regions(q, 2, out, torch.zeros_like(mask), mask, 0.0, progress())

    for theta in (0.0, 2.0):
        assert torch.equal(rewritten(theta)[:2], q[:2])
    nothing = rewritten(2.0)[2:]  # no confidence reaches it
    assert torch.equal(nothing, q[2:]) if threshold == 0 else (nothing == IGNORE).all()
    everything = rewritten(0.0)[2:]
    own = half(out.logits).argmax(1)
    inside = nearest(mask, (4, 4))
    assert (everything < 6).all()
    assert set(everything.unique().tolist()) <= set(own.unique().tolist())
    flat = method.through_regions(q, 2, out, torch.ones_like(mask), mask, 0.0, progress())[2:]
    assert torch.equal(flat, q[2:]) if threshold == 0 else (flat == IGNORE).all()  # padding takes no part
    assert inside.any()


def test_nearest_is_exact():
    labels = torch.randint(5, (2, 321, 49))
    expected = labels[:, [i * 321 // 40 for i in range(40)]][:, :, [i * 49 // 13 for i in range(13)]]
    assert torch.equal(nearest(labels, (40, 13)), expected)


def test_one_of_five_changes_images():
    colour = ONE_OF_FIVE
    image = tv_tensors.Image(torch.randint(256, (3, 20, 24), dtype=torch.uint8))
    with seeded(1):
        views = [normalize(colour(image)) for _ in range(30)]
        again = [normalize(colour(image)) for _ in range(30)]
    low, high = normalize(torch.zeros_like(image)), normalize(torch.full_like(image, 255))
    for view in (*views, *again):
        assert view.shape == image.shape
        assert (view >= low - 1e-6).all()
        assert (view <= high + 1e-6).all()
    assert len({view.sum().item() for view in views}) > 15
    with seeded(1):
        assert all(map(torch.equal, views, [normalize(colour(image)) for _ in range(30)]))


def test_scales_from_the_size_that_fits():
    sizes = []
    image = tv_tensors.Image(torch.full((3, 40, 80), 200, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.zeros(40, 80, dtype=torch.uint8))
    for _ in range(20):
        _, labels = Geometry(scales=(0.5,), fit=True)(image, mask, 64)
        sizes.append((labels != IGNORE).sum().item())
    assert set(sizes) == {16 * 32}
