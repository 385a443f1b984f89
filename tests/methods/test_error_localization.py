"""The error localization network, compared with recordings of the published code, and its stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from child import in_two_processes
from recordings import load, progress, recorded, relative
from torch import nn
from training import small_config

from corrmatch.config import load_config
from corrmatch.data.datasets import IGNORE
from corrmatch.methods import build_method, error_localization
from corrmatch.methods.error_localization import kept_bad, localization, question, windowed_contrast
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.network import Prediction, enlarge
from corrmatch.training import checkpoint
from corrmatch.training.trainer import Trainer

FILES = recorded("41_error_localization_*")
SMALL = ("error_localization.network=test_resnet", "error_localization.dimensions=8", "train.crop=65",
         "error_localization.pretraining=1", "error_localization.localization=1")  # fmt: skip


def small_method(*overrides):
    keys = ["data.root=x", "method=error_localization", "model.channels=16", "propagation.num_masks=8"]
    return build_method(load_config("sample", [*keys, *SMALL, *overrides]), 7)


@FILES
def test_recorded_supervised_term(path):
    at = load(path, "ce_")
    loss = losses.supervised(at["logits"].requires_grad_(), at["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-6)
    assert relative(at["logits"].grad, at["grad"]) < 2e-6


@FILES
def test_recorded_decoders(path):
    """Both decoders learn, one does, none does."""
    at = load(path, "ax_")
    for main, expected, gradient in zip(at["main_loss"], at["loss"], at["grad"], strict=True):
        logits = at["logits"].clone().requires_grad_()
        loss = kept_bad([losses.supervised(x, at["labels"]) for x in logits], main, (20, 50))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert relative(logits.grad, gradient) < 2e-6


@FILES
def test_recorded_question(path):
    at = load(path, "in_")
    assert relative(question(at["images"], at["logits"].requires_grad_()), at["combined"]) < 1e-6


@FILES
def test_recorded_localization(path):
    """Pixels without a label count as errors."""
    at = load(path, "el_")
    said = question(torch.zeros(2, 3, 33, 33), at["detached_logits"])[:, 4:].argmax(1)
    right = said == at["labels"]
    assert (at["labels"] == IGNORE).any()
    loss = localization(at["map_logits"].requires_grad_(), right, torch.ones_like(right))
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-6)
    assert relative(at["map_logits"].grad, at["grad"]) < 2e-6


@FILES
def test_recorded_targets(path):
    at, method = load(path, "ps_"), small_method()
    ignore = torch.zeros(2, 65, 73, dtype=torch.bool)
    labels, valid = method.targets(Prediction(at["teacher_logits"]), at["map_logits"], ignore, progress())
    assert torch.equal(valid.float(), at["valid"])
    assert torch.equal(labels.masked_fill(~valid, IGNORE), at["labels"])
    loss = losses.pseudo_supervised(at["student_logits"].requires_grad_(), labels, valid, valid)
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-6)
    assert relative(at["student_logits"].grad, at["grad"]) < 2e-6


@FILES
@pytest.mark.parametrize("prefix", ["co_", "c8_"])
def test_recorded_contrast(path, prefix):
    at = load(path, prefix)
    target, classes = at["target"].requires_grad_(), int(at["labels"][at["labels"] != IGNORE].max()) + 1
    offsets = at.get("offsets", torch.zeros(1, 2, dtype=torch.long))
    valid = (at["valid"] == 1) & (at["labels"] != IGNORE)
    loss = windowed_contrast(at["anchors"], target, at["labels"], valid, classes, offsets, (32, 32))
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-6)
    assert relative(target.grad, at["grad"]) < 2e-6


@FILES
def test_recorded_average(path):
    """Parameters are averaged. Running statistics are not."""
    at = load(path)

    def state(prefix):
        return {name.removeprefix(prefix): x for name, x in at.items() if name.startswith(prefix)}

    student, method = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), small_method()
    teacher = Teacher(student, method.teacher.decay, ramp=method.teacher.ramp, mode="train",
                      buffers=method.teacher.buffers_are)  # fmt: skip
    student.load_state_dict(state("em_student_"))
    teacher.network.load_state_dict(state("em_before_"))
    teacher.follow(student, 7)
    for name, expected in state("em_after_").items():
        assert relative(teacher.network.state_dict()[name].double(), expected.double()) < 1e-6


def test_contrast_is_what_it_says(monkeypatch):
    """The definition, pair by pair, for two images, in uneven blocks. One class has one pixel, one has none."""
    monkeypatch.setattr(error_localization, "ROWS", 7)
    g, anchors = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)
    labels, valid = torch.randint(3, (2, 3, 5)), torch.rand(2, 3, 5) < 0.8
    valid[labels == 2] = False
    labels[0, 0, 0], valid[0, 0, 0] = 3, True
    loss = windowed_contrast(anchors, g, labels, valid, 5, torch.zeros(1, 2, dtype=torch.long), (3, 5))
    a, b = (F.normalize(x.movedim(1, -1).flatten(0, 2), dim=1) for x in (anchors, g))
    similar, y = (a @ b.mT / 0.5).exp(), torch.where(valid, labels, -1).flatten()
    terms = []
    for c in y[y >= 0].unique():
        own, other = y == c, (y >= 0) & (y != c)
        near, far = similar[own][:, own].sum(), similar[own][:, other].sum()
        terms.append(-(near / (near + far)).log() / own.sum())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, g)[0] for x in (loss, expected)))
    assert (
        windowed_contrast(anchors, g, labels, valid & False, 5, torch.zeros(1, 2, dtype=torch.long), (3, 5)).item() == 0
    )


def test_errors_weigh_as_much_as_what_is_right():
    logits, right = torch.randn(2, 1, 9, 9), torch.rand(2, 9, 9) < 0.9
    everything = torch.ones_like(right)
    each = F.binary_cross_entropy_with_logits(logits[:, 0], right.float(), reduction="none")
    expected = (each[right].sum() + each[~right].mean() * right.sum()) / right.numel()
    torch.testing.assert_close(localization(logits, right, everything), expected)
    for nothing in (localization(logits, right | True, everything), localization(logits, right, everything & False)):
        assert nothing.isfinite()  # published: divided by zero


def test_pixels_without_a_label_can_be_left_out():
    torch.manual_seed(3)
    truth = torch.randint(7, (2, 65, 65))
    truth[:, 30:] = IGNORE
    found = []
    for void in ("true", "false"):
        torch.manual_seed(4)
        method = small_method(f"error_localization.void={void}").train()
        images = torch.randn(2, 3, 65, 65)
        features = method.model.features(images)
        found.append(method.localize(images, truth, features, torch.tensor(1.0))["errors"].item())
    assert found[0] != found[1]


def test_no_pixel_called_right():
    """The term is 0, not NaN as in the published code."""
    method = small_method().train()
    unlabeled = {"weak": torch.randn(2, 3, 65, 65), "strong": torch.randn(2, 1, 3, 65, 65)}
    unlabeled["ignore"] = torch.ones(2, 65, 65, dtype=torch.bool)
    terms, shown = method.unlabeled(unlabeled, progress())
    assert [x.item() for x in (*terms.values(), shown["valid"])] == [0, 0, 0]


@pytest.fixture(scope="module")
def finished(small_sample, tmp_path_factory):
    """A run of all stages, and a list of its events."""
    happened = []
    keys = ("method=error_localization", *SMALL, "train.epochs=3", "train.epoch_steps=2", "train.schedule=constant")
    run = Trainer(small_config(small_sample, tmp_path_factory.mktemp("run"), *keys, "train.optimizer=adamw"))
    advance = run.advance

    def watched(loader):
        before = [p.clone() for p in run.method.model.parameters()]
        renewed = run.method.before_step

        def note(progress):
            renewed(progress)
            after = [p.clone() for p in run.method.model.parameters()]
            teacher = [p.clone() for p in run.method.teacher.network.parameters()]
            happened.append((run.step, run.phase, not all(map(torch.equal, before, after)),
                             all(map(torch.equal, teacher, after))))  # fmt: skip

        run.method.before_step = note
        advance(loader)
        run.method.before_step = renewed

    run.advance = watched
    run.run()
    return run, happened


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_the_student_is_overwritten_at_the_start_of_later_epochs(finished):
    """It is not overwritten in the first epoch of the third stage, where both are equal, nor at the end of the run."""
    run, happened = finished
    assert [phase for _, phase, *_ in happened] == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [step for step, _, changed, _ in happened if changed] == [6, 8]
    assert [step for step, phase, _, same in happened if same and phase == 2] == [4, 6, 8]
    assert not all(map(torch.equal, run.method.model.parameters(), run.method.teacher.network.parameters()))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_the_optimizer_carries_on_over_stages(finished):
    """Adam's number of steps for each parameter is that of all stages that train it."""
    run, _ = finished
    state = run.optimizer.state
    steps = {name: int(state[p]["step"]) for name, p in run.method.trained()}
    for name, count in steps.items():
        part = name.partition(".")[0]
        assert count == {"model": 10, "decoders": 8, "localizer": 8, "projection": 6}[part], name


def test_the_teacher_drops_nothing():
    method = small_method("model.dropout=[0.5,0.5,0.5]").train()
    images = torch.randn(2, 3, 65, 65)
    assert torch.equal(method.teacher(images).logits, method.teacher(images).logits)
    assert not torch.equal(method.model(images).logits, method.model(images).logits)
    assert all(module.training for module in method.teacher.network.modules())


def test_regions_add_to_what_is_called_right():
    method = small_method("propagation.head=true", "propagation.regions=true").train()
    images = torch.randn(2, 3, 65, 65)
    taught = method.teacher(images, features=True, correlate=True)
    right, ignore = torch.randn(2, 1, *taught.logits.shape[2:]) + 2, torch.zeros(2, 65, 65, dtype=torch.bool)
    ignore[:, :, 40:] = True
    labels, valid = method.targets(taught, right, ignore, progress())
    called = right[:, 0] > 0
    called[:, :, enlarge(ignore[:1, None].float(), called.shape[1:])[0, 0, 0] > 0.5] = False
    assert (valid | ~called).all()
    assert torch.equal(labels[~valid], taught.logits.argmax(1)[~valid])
    assert not valid[:, :, 11:].any()


def test_networks():
    """The error network takes image, entropy and logits. Auxiliary decoders have no backbone."""
    method = small_method()
    stem = next(module for module in method.localizer.modules() if isinstance(module, nn.Conv2d))
    assert stem.in_channels == 3 + 1 + 7
    assert method.localizer.classifier.out_channels == 1
    assert [sum(p.numel() for p in decoder.backbone.parameters()) for decoder in method.decoders] == [0, 0]
    first, second = (decoder.classifier.weight for decoder in method.decoders)
    assert not torch.equal(first, second)
    method.phase = 1
    shown = method.eval().panels(method.model, torch.randn(1, 3, 65, 65))
    assert shown["called right"].dtype == torch.bool
    assert shown["called right"].shape == shown["prediction"].shape


def run_in_two(data, folder):
    """Runs all stages; each process has its own images."""
    torch.set_num_threads(1)
    keys = ("method=error_localization", *SMALL, "train.epoch_steps=2", "train.epochs=2", "train.cpu=true")
    run = Trainer(small_config(data, folder, *keys))
    run.run()
    name = f"weights{run.process}.pt"
    torch.save(dict(run.method.named_parameters()), folder / name)


@pytest.mark.slow
def test_two_processes_hold_the_same(small_sample, tmp_path):
    """Both processes have the gradients of every trained parameter, and both overwrite the student."""
    folder = tmp_path / "two"
    in_two_processes(__file__, f"run_in_two({str(small_sample)!r}, Path({str(folder)!r}))", tmp_path)
    first, second = (torch.load(Path(folder, f"weights{process}.pt")) for process in (0, 1))
    for name, p in first.items():
        assert torch.equal(p, second[name]), name
    content = checkpoint.load(folder / "last.pt")
    assert (content["step"], content["phase"], len(content["random"])) == (8, 2, 2)
