"""Dual Teacher, compared with recordings of the published code."""

from __future__ import annotations

import pytest
import torch
from recordings import Recorded, load, method_of, progress, recorded, relative
from torch import nn

from corrmatch.methods import dual_teacher
from corrmatch.methods.dual_teacher import Mixed, centred_boxes, inside, mix
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import enlarge

FILES = recorded("47_dual_teacher_*")
SWAPPED = torch.tensor([1, 0])


def published(num_classes, *networks, **options):
    """A method that enlarges logits as the recordings do. Its first turn has ten steps."""
    networks = networks or (nn.Conv2d(1, 1, 1),)
    method = method_of("dual_teacher", num_classes, *networks, align_corners=False, **options)
    method.turn_steps = 10
    return method


def pseudo_labels(logits, size):
    return PseudoLabels.of(enlarge(logits, size, align_corners=False), torch.zeros(logits.shape[0], *size).bool())


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


@FILES
def test_recorded_step_of_classes(path, monkeypatch):
    """A whole step of an odd turn: the labelling teacher, the mix, and two of the three terms."""
    at = load(path, "classmix_")
    student, size = at["student_logits"].requires_grad_(), at["label"].shape[1:]
    again = torch.zeros(2, 150, 5, 6)
    network = Recorded(student, again)
    method = published(150, network)
    method.teachers[0].network, method.teachers[1].network = Recorded(), Recorded(at["teacher_logits"])
    monkeypatch.setattr(dual_teacher, "recolour", lambda *_, **__: at["strong"])
    monkeypatch.setattr(dual_teacher, "class_mix", lambda *_: at["mask"] == 1)
    images = torch.randn(2, 3, *size)
    batch = {
        "labeled": {"image": images, "label": at["label"]},
        "unlabeled": {"weak": images + 1, "ignore": torch.zeros(2, *size, dtype=torch.bool)},
    }
    loss, scalars = method.train()(batch, progress(step=13))
    (given, training), (strong, _) = network.given
    assert torch.equal(given[:2], images)
    assert relative(given[2:], at["student_input"]) < 1e-6
    assert torch.equal(strong, at["strong"])
    assert training
    ((labelled, mode),) = method.teachers[1].network.given
    assert torch.equal(labelled, images + 1)
    assert mode
    assert (scalars["x"] + scalars["mix"]).item() == pytest.approx(at["loss"].item(), rel=1e-5)
    assert loss.item() == pytest.approx((scalars["x"] + scalars["mix"] + 0.2 * scalars["consistency"]).item())
    assert relative(gradient(loss, student), at["grad"]) < 1e-4


@FILES
def test_recorded_consistency(path):
    """The recording counts pixels of images with labels. The method counts pixels that are not padding."""
    at = load(path, "ic_")
    student, size = at["student_logits"].requires_grad_(), at["label"].shape[1:]
    target = pseudo_labels(at["teacher_logits"], size)._replace(ignore=at["label"] == 255)
    loss = published(13).consistency(student, target)
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    assert relative(gradient(loss, student), at["grad"]) < 1e-4


@FILES
def test_recorded_loss_of_boxes(path):
    at = load(path, "cutmix_")
    logits, everywhere = at["logits"].requires_grad_(), torch.ones_like(at["labels"], dtype=torch.bool)
    unused = at["confidence"].flip(0)  # that of what was pasted
    mixed = Mixed(None, at["labels"], unused, everywhere)
    target = PseudoLabels(at["labels"], at["confidence"], ~everywhere)
    loss = published(13).box_loss(logits, mixed, target)
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    assert relative(gradient(loss, logits), at["grad"]) < 1e-4


@FILES
def test_recorded_mix_of_boxes(path):
    """The box is where the mixed image differs. There is none if the random order maps each image to itself."""
    at = load(path, "branch_")
    target = pseudo_labels(at["teacher_logits"], at["label"].shape[1:])
    assert relative(target.confidence, at["confidence"]) < 1e-6
    box = (at["mixed"] != at["image_u"]).any(1)
    other = SWAPPED if box.any() else SWAPPED.flip(0)
    mixed = mix(at["image_u"], target, box, other, padding=True)
    assert torch.equal(mixed.images, at["mixed"])
    assert torch.equal(mixed.labels, at["mixed_labels"])


@FILES
def test_recorded_step_of_boxes(path, monkeypatch):
    """The losses of an even turn, from the recorded values after random colours and flips.

    The recorded confidence has 8 bits, so pixels between 0.95 and 0.953 are not in the recorded share.
    """
    at = load(path, "branch_")
    student, size = at["student_logits"].requires_grad_(), at["label"].shape[1:]
    rounded = (at["confidence"] * 255).floor() / 255
    for b in range(2):
        mirrored = torch.equal(at["student_labels"][b], at["mixed_labels"][b].flip(-1))
        labels, confidence = (x[b].flip(-1) if mirrored else x[b] for x in (at["mixed_labels"], rounded))
        assert torch.equal(at["student_labels"][b], labels)
        assert relative(at["student_confidence"][b], confidence) < 1e-6
    network = Recorded(student, torch.zeros(2, 13, 9, 11))
    method = published(13, network)
    target = PseudoLabels(at["mixed_labels"], rounded, torch.zeros(2, *size, dtype=torch.bool))
    mixed = Mixed(at["student_input"], at["student_labels"], None, ~target.ignore)
    monkeypatch.setattr(method, "targets", lambda *_: target)
    monkeypatch.setattr(method, "box_mixed", lambda *_: mixed)
    method.teachers[0].network = Recorded(at["teacher_logits"])
    batch = {
        "labeled": {"image": at["image_u"], "label": at["label"]},
        "unlabeled": {"weak": at["image_u"], "ignore": target.ignore},
    }
    loss, scalars = method(batch, progress(step=20))
    assert torch.equal(network.given[0][0][2:], at["student_input"])
    assert (scalars["x"] + scalars["mix"]).item() == pytest.approx(at["loss"].item(), rel=1e-5)
    assert relative(gradient(loss, student), at["grad"]) < 1e-4


@FILES
def test_recorded_boxes(path):
    at = load(path)
    boxes = centred_boxes(at["draw_lam"], at["draw_centre_row"], at["draw_centre_column"], [321, 401])
    for column, name in enumerate(("row0", "column0", "row1", "column1")):
        assert torch.equal(boxes[:, column], at[f"box_{name}"])
    masks = inside(boxes, [321, 401])
    for box, mask in zip(boxes.tolist(), masks, strict=True):
        expected = torch.zeros(321, 401, dtype=torch.bool)
        expected[box[0] : box[2], box[1] : box[3]] = True
        assert torch.equal(mask, expected)


@FILES
def test_recorded_teacher(path):
    """Two turns of one teacher. It is not updated in the turns of the other one between them."""
    at = load(path, "ema_")

    def state(who, step):
        prefix = f"{who}_"
        found = {name.removeprefix(prefix): x for name, x in at.items() if name.startswith(prefix)}
        return {name.replace("_", ".", 1): x[step] for name, x in found.items() if name != "running_mean_untouched"}

    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    method = method_of("dual_teacher", 2, student)
    method.turn_steps = 4
    teachers = [teacher.network for teacher in method.teachers]
    for teacher in teachers:
        teacher.load_state_dict(state("teacher", 0), strict=False)
        teacher[1].running_mean.copy_(at["teacher_running_mean_untouched"])
    student[1].running_mean.fill_(5)
    for number, step in enumerate([0, 1, 2, 3, 8, 9, 10, 11], start=1):
        student.load_state_dict(state("student", number), strict=False)
        method.after_step(progress(step))
        for name, expected in state("teacher", number).items():
            torch.testing.assert_close(teachers[0].state_dict()[name], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(teachers[0][1].running_mean, at["teacher_running_mean_untouched"])
    for name, expected in state("teacher", 0).items():
        assert torch.equal(teachers[1].state_dict()[name], expected)


def test_turns():
    """A teacher equals the student after the first step of its turn; without `restart` it continues its average."""
    for restart, expected in ((True, [1, 1.5, 1.5, 1.5, 5, 5.5]), (False, [1, 1.5, 1.5, 1.5, 2.2, 2.83333])):
        network = nn.Conv2d(1, 1, 1)
        nn.init.zeros_(network.weight)
        method = method_of("dual_teacher", 2, network, restart=restart)
        method.turn_steps, history = 2, []
        for step in range(6):
            nn.init.constant_(network.weight, step + 1.0)
            method.after_step(progress(step))
            history.append(method.teachers[0].network.weight.item())
        assert history == pytest.approx(expected, rel=1e-4)
        assert method.teachers[1].network.weight.item() == pytest.approx(3.5 if restart else 1.75)
    again = method_of("dual_teacher", 2, nn.Conv2d(1, 1, 1))
    again.load_state_dict(method.state_dict())
    assert again.turn_steps == 2


def labelled(count=4, size=(40, 48), classes=5):
    labels = torch.randint(classes, (count, *size))
    return PseudoLabels(labels, torch.rand(count, *size), torch.rand(count, *size) < 0.2)


def test_boxes_take_labels_along():
    """After colours and flips the labels belong to the same pixels. The colour of an image encodes its label here."""
    target = labelled()
    method = published(5)
    images = target.labels.unsqueeze(1).expand(-1, 3, -1, -1) / 4.0
    colours = dual_teacher.AFTER_BOXES
    areas = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dual_teacher, "recolour", lambda x, colour, _: x if colour is colours else None)
            mixed = method.box_mixed(images, target, generator)
        assert torch.equal((4 * mixed.images[:, 0]).round().long(), mixed.labels)
        still = mixed.labels == target.labels
        mirrored = mixed.labels == target.labels.flip(-1)
        areas.append(1 - torch.maximum(still.float().mean((1, 2)), mirrored.float().mean((1, 2))))
    assert 0.1 < torch.stack(areas).mean() < 0.5  # 0.8 of a box of half the image, cut off at its border


def test_no_confident_pixel_gives_no_loss():
    """The published code divides by zero here."""
    target = labelled()._replace(confidence=torch.zeros(4, 40, 48))
    logits = torch.randn(4, 5, 11, 13, requires_grad=True)
    method = published(5)
    mixed = Mixed(None, target.labels, target.confidence, ~target.ignore)
    for loss in (method.box_loss(logits, mixed, target), method.class_loss(logits, mixed)):
        assert loss.item() == 0
        assert not gradient(loss, logits).any()


@pytest.mark.parametrize("padding", [False, True])
def test_padding(padding):
    """Padding counts in the mixed terms as published, or not at all."""
    target, method = labelled(), published(5, padding=padding)
    logits = torch.randn(4, 5, 40, 48, requires_grad=True)
    for boxes in (False, True):
        base = torch.randn(4, 3, 40, 48)
        mixed = (method.box_mixed if boxes else method.class_mixed)(base, target, torch.Generator().manual_seed(1))
        loss = method.box_loss(logits, mixed, target) if boxes else method.class_loss(logits, mixed)
        touched = gradient(loss, logits).abs().sum(1) > 0
        assert mixed.counted.all() == padding
        assert torch.equal(touched, mixed.counted)
    assert not (gradient(method.consistency(logits, target), logits).abs().sum(1) > 0)[target.ignore].any()


def test_a_share_of_confident_pixels_is_a_weight():
    """With boxes it is the share of the image before pasting, with classes the share of the whole batch."""
    target, method = labelled(), published(5)
    target = target._replace(confidence=torch.tensor([0.0, 1.0, 1.0, 1.0]).view(4, 1, 1).expand(4, 40, 48).contiguous())
    logits, everywhere = torch.randn(4, 5, 40, 48), torch.ones(4, 40, 48, dtype=torch.bool)
    mixed = Mixed(None, target.labels, target.confidence, everywhere)
    pixels = nn.functional.cross_entropy(logits, target.labels, reduction="none")
    torch.testing.assert_close(method.box_loss(logits, mixed, target), pixels[1:].mean())
    torch.testing.assert_close(method.class_loss(logits, mixed), 0.75 * pixels.mean())


def test_regions_make_pixels_sure():
    """A pixel that a region labels has confidence 1. Other pixels do not change."""

    class Regions(Propagation):
        def targets(self, pseudo, threshold, masks, valid, classes):
            after = pseudo.labels.clone()
            after[:, :10] = 3
            reliable = pseudo.reliable(threshold)
            reliable[:, :20] |= valid[:, :20]
            return after, reliable

    target, method = labelled(), published(5)
    part = Regions(method.propagation.config)
    assert part.rewritten(target, 0.5, None, 5) is target
    after = part.rewritten(target, 0.5, "masks", 5)
    sure = after.confidence == 1
    assert torch.equal(sure[:, 20:], target.confidence[:, 20:] == 1)
    assert torch.equal(after.confidence[:, 20:], target.confidence[:, 20:])
    already = (target.confidence >= 0.5) & (after.labels == target.labels)
    assert torch.equal(after.confidence[already], target.confidence[already])
    assert (after.confidence >= 0.5)[:, :20][target.counted[:, :20]].all()
    assert torch.equal(after.confidence[target.ignore], target.confidence[target.ignore])


def test_stochastic_depth_is_the_students_alone():
    """The teachers have the same weights and all blocks."""
    from corrmatch.config import load_config
    from corrmatch.methods.dual_teacher import DualTeacher

    config = load_config(
        "sample", ["data.root=x", "method=dual_teacher", "dual_teacher.drop_path=0.5", "model.channels=8"]
    )
    method = DualTeacher(NetworkFactory(config.model, 6), config)
    chances = [[m.drop_prob for m in network.modules() if hasattr(m, "drop_prob")]
               for network in (method.model, method.teachers[0].network)]  # fmt: skip
    assert chances[0] == sorted(chances[0])
    assert chances[0][-1] == 0.5
    assert chances[1] == []
    for mine, theirs in zip(method.model.parameters(), method.teachers[1].network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
