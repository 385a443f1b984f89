"""Properties of all methods. Every test runs for each method, with correlation propagation and without."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from child import in_two_processes
from training import (
    VIT,
    assert_same,
    build_without_batch_effects,
    count_everything,
    die_in_step,
    scalars,
    small_config,
    stop_after,
)

from corrmatch.config import ConfigError, load_config
from corrmatch.methods import METHODS, build_method
from corrmatch.methods.base import Method, Progress
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.network import evaluating
from corrmatch.training import checkpoint, trainer
from corrmatch.training.predict import load_model
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

# Options with which no term of a method vanishes for an untrained network.
ALIVE = {
    "corrmatch": ("corrmatch.threshold=0.2",),
    "fixmatch": ("fixmatch.threshold=0.2",),
    "unimatch": ("unimatch.threshold=0.2",),
    "unimatch_v2": ("unimatch_v2.threshold=0.2",),
    "color_augmentation": ("color_augmentation.threshold=0.2", "color_augmentation.frozen_norms=false"),
    "fuzzy_positive": (),
    "dual_teacher": ("dual_teacher.threshold=0.2",),
    # With the published weights, networks that know nothing agree on one class before they learn another one.
    "mutual_distillation": ("mutual_distillation.teacher_weight=0.5", "mutual_distillation.student_weight=0.3"),
    "prcl": (
        "prcl.anchors=8",
        "prcl.negatives=16",
        "prcl.dimensions=16",
        "prcl.threshold=0.2",
        "prcl.weak_threshold=0.2",
    ),
    "cross_teacher": ("cross_teacher.threshold=0.2",),
    "subclass": ("subclass.threshold=0.2", "subclass.dropout=0"),
    "error_localization": (
        "error_localization.pretraining=1",
        "error_localization.localization=1",
        "error_localization.network=test_resnet",
        "error_localization.dimensions=8",
    ),
    "forgetting": ("forgetting.ratios=[0.5,1]",),
    "self_training": ("self_training.rounds=2", "propagation.region_threshold=0.5"),
}
# Other published forms of methods.
FORMS = {
    "fixmatch, second form": ("fixmatch", ("fixmatch.teacher=eval", "fixmatch.partner=batch")),
    "fixmatch, propagated labels": ("fixmatch", ("propagation.label_temperature=0.05",)),
    "corrmatch, teacher": (
        "corrmatch",
        ("corrmatch.teacher=train", "train.logit_adjustment=0.5", "propagation.label_temperature=0.1"),
    ),
    "corrmatch, thresholds of classes": (
        "corrmatch",
        (
            "corrmatch.teacher=eval",
            "corrmatch.class_share=0.7",
            "corrmatch.fp_weight=0",
            "propagation.rule=confirm",
            "propagation.region_threshold=0.5",
        ),
    ),
    "unimatch, averaged": (
        "unimatch",
        ("unimatch.teacher=eval", "unimatch.class_share=0.5", "propagation.region_threshold=0.8"),
    ),
    "self_training, views": (
        "self_training",
        (
            "self_training.anew=false",
            "self_training.scales=[1,1.25]",
            "self_training.reflect=true",
            "self_training.class_share=0.7",
            "propagation.rule=confirm",
        ),
    ),
    "fixmatch, thresholds of classes": (
        "fixmatch",
        ("fixmatch.class_share=0.5", "propagation.region_threshold=0.8"),
    ),
    "subclass, adjusted": ("subclass", ("train.logit_adjustment=0.5",)),
    "cross_teacher, contrast": (
        "cross_teacher",
        (
            "cross_teacher.contrast=0.1",
            "cross_teacher.mix=true",
            "cross_teacher.bank=2",
            "cross_teacher.bank_threshold=0",
        ),
    ),
}
# Without decoder=dpt.
CONVOLUTIONAL = {"subclass": "two branches share the backbone of a DeepLabV3+"}
# One number for a batch: two batches are not one of twice the size.
BATCH_WIDE = {
    "color_augmentation": "the confidence rate is a mean over the batch of one process",
    "fuzzy_positive": "the balance is a ratio of means over the batch of one process",
    "self_training": "images are mixed within the batch of one process",
    "unimatch_v2": "images are mixed within the batch of one process, of which half go without dropout",
    "dual_teacher": "images are mixed within the batch of one process",
    "mutual_distillation": "images are mixed with the next one of the batch of one process",
    "prcl": "images are mixed with the next one of the batch of one process",
    "cross_teacher": "the rate of confident pixels is a mean over the batch of one process",
}


def cases(skipped=()):
    """The method, its form, and whether propagation is on."""
    found = []
    named = (
        {name: (name, ()) for name in METHODS}
        | FORMS
        | {f"{name}, dpt": (name, VIT) for name in METHODS if name not in CONVOLUTIONAL}
    )
    for label, (name, form) in named.items():
        if name in skipped:
            continue
        for on in (True,) if form == VIT else (False, True):
            regions = on and METHODS[name].pseudo_labels
            switches = (f"propagation.head={on}", f"propagation.regions={regions}")
            overrides = (f"method={name}", *form, *switches, *ALIVE.get(name, ()))
            found.append(pytest.param(name, overrides, id=f"{label}-{'propagation' if on else 'plain'}"))
    return found


all_methods = pytest.mark.parametrize(("name", "overrides"), cases())


@pytest.fixture(scope="module")
def sample(small_sample):
    return small_sample


@all_methods
def test_gradients_and_teachers(sample, tmp_path, name, overrides):
    """In every phase each trained parameter gets a gradient. A teacher gets none, and changes only between steps."""
    run = Trainer(small_config(sample, tmp_path / "run", *overrides))
    for phase in range(len(run.ends)):
        if phase > 0:
            run.step = run.ends[phase - 1]
            run.start_phase(phase)
        check_gradients(run)


def check_gradients(run):
    method = run.method.train()
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    before = [p.clone() for teacher in teachers for p in teacher.parameters()]
    progress = Progress(run.step, run.steps, run.epoch_steps, run.phase, torch.Generator().manual_seed(0))
    loss, values = method(next(run.loader()), progress)
    loss.backward()
    assert loss.isfinite()
    assert all(value.isfinite() and not value.requires_grad and value.dim() == 0 for value in values.values())
    trained = dict(method.trained())
    groups = [p for group in method.parameter_groups(run.config.train) for p in group["params"]]
    assert {id(p) for p in groups} == {id(p) for p in trained.values()}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    for teacher in teachers:
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(map(torch.equal, before, [p for teacher in teachers for p in teacher.parameters()]))
    method.zero_grad()


@all_methods
def test_kill_and_resume_is_bit_for_bit_an_uninterrupted_run(sample, tmp_path, monkeypatch, name, overrides):
    ends = []
    for folder in ("whole", "halves"):
        config = small_config(sample, tmp_path / folder, *overrides, "train.save_every=2", "train.eval_every=4")
        run = Trainer(config)
        if folder == "halves":
            die_in_step(run, 4, monkeypatch)
            run = Trainer(config, resume=True)
            assert run.step == 2
        run.run()
        ends.append(checkpoint.load(tmp_path / folder / "last.pt"))
        ends[-1].pop("config")
    assert_same(*ends)
    for kind in ("train", "val"):
        assert scalars(tmp_path / "halves", kind) == scalars(tmp_path / "whole", kind)


def die(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "overrides"), cases(skipped=[name for name, kind in METHODS.items() if kind.phases is Method.phases])
)
def test_killed_between_phases_and_in_each(sample, tmp_path, monkeypatch, name, overrides):
    """A run that is killed before the work between two phases, right after it, or a step later has the same result."""
    keys = (*overrides, "train.epoch_steps=2", "train.save_every=1", "train.eval_every=1")
    whole, killed = (small_config(sample, tmp_path / folder, *keys) for folder in ("whole", "killed"))
    Trainer(whole).run()
    run = Trainer(killed)
    for phase in range(1, len(run.ends)):
        first = run.ends[phase - 1]
        monkeypatch.setattr(run, "start_phase", die)
        with pytest.raises(KeyboardInterrupt):
            run.run()
        for step in (first + 1, first + 2):
            run = Trainer(killed, resume=True)
            assert (run.step, run.phase) == (first, phase - 1)
            die_in_step(run, step, monkeypatch)
        run = Trainer(killed, resume=True)
        assert (run.step, run.phase) == (first + 1, phase)
    run.run()
    ends = [checkpoint.load(tmp_path / folder / "last.pt") for folder in ("whole", "killed")]
    for end in ends:
        end.pop("config")
    assert_same(*ends)
    for kind in ("train", "val"):
        assert scalars(tmp_path / "killed", kind) == scalars(tmp_path / "whole", kind)


@all_methods
def test_what_is_predicted_with_is_what_was_scored(sample, tmp_path, name, overrides):
    run = Trainer(small_config(sample, tmp_path / "run", *overrides, "train.ema=0.5"))
    stop_after(run, 2)
    run.run()
    assert next(iter(run.method.scored)) == "average"
    model, _, _ = load_model(tmp_path / "run" / "last.pt")
    images = torch.randn(2, 3, 49, 49)
    with evaluating(run.method.average.network), torch.no_grad():
        torch.testing.assert_close(model(images).logits, run.method.average.network(images).logits, rtol=0, atol=0)
    assert {"miou", "accuracy"} < scalars(tmp_path / "run", "val")[0].keys()


@pytest.mark.parametrize(("name", "overrides"), cases(skipped=BATCH_WIDE))
def test_accumulated_batches_are_one_large_batch(sample, tmp_path, monkeypatch, name, overrides):
    """For layers without batch statistics, and without regions, because each batch draws its own positions."""
    monkeypatch.setattr(trainer, "build_method", build_without_batch_effects)
    weights = []
    for folder, batch, accumulate in (("large", 4, 1), ("small", 2, 2)):
        sizes = (f"train.batch_size={batch}", f"train.accumulate={accumulate}")
        fixed = (*overrides, "propagation.regions=false", "corrmatch.momentum=1", "fixmatch.partner=stream")
        run = Trainer(small_config(sample, tmp_path / folder, *fixed, *sizes, "train.lr=0.01"))
        count_everything(run)
        stop_after(run, 2)
        run.run()
        weights.append(run.method.state_dict())
    assert_close(weights[1], weights[0])


def assert_close(states, expected):
    for key, value in expected.items():
        torch.testing.assert_close(states[key], value, rtol=1e-4, atol=1e-5, msg=f"{key} differs")


def train_without_batch_effects(data, folder, batch):
    """Trains all methods, one after the other."""
    torch.set_num_threads(1)
    for case in cases(skipped=BATCH_WIDE):
        _, overrides = case.values
        fixed = ("fixmatch.partner=stream", f"train.batch_size={batch}", "train.cpu=true", "train.lr=0.01")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_method", build_without_batch_effects)
            run = Trainer(small_config(data, folder / case.id, *overrides, *fixed))
        count_everything(run)
        stop_after(run, 2)
        run.run()


def test_two_processes_are_one_with_the_doubled_batch(sample, tmp_path):
    """Layers have no batch statistics. There are three validation images."""
    call = f"train_without_batch_effects({str(sample)!r}, Path({str(tmp_path / 'two')!r}), 2)"
    in_two_processes(__file__, call, tmp_path)
    train_without_batch_effects(sample, tmp_path / "one", 4)
    for case in (case.id for case in cases(skipped=BATCH_WIDE)):
        one, two = (tmp_path / name / case for name in ("one", "two"))
        ends = [checkpoint.load(folder / "last.pt") for folder in (one, two)]
        assert [len(content["random"]) for content in ends] == [1, 2]
        assert_close(ends[1]["method"], ends[0]["method"])
        for kind in ("miou", "accuracy"):
            assert scalars(two, "val")[0][kind] == pytest.approx(scalars(one, "val")[0][kind])


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_key_is_named(name):
    with pytest.raises(ConfigError, match=rf"^{name}\.no_such: no such key"):
        load_config("sample", ["data.root=x", f"method={name}", f"{name}.no_such=1"])


@pytest.mark.parametrize("name", METHODS)
def test_propagation_is_off_unless_published_or_asked_for(name):
    """If it is off, there is no head, and a checkpoint has no keys of it."""
    config = load_config("sample", ["data.root=x", f"method={name}", "model.channels=8"])
    method = build_method(config, 6)
    parts = (method.propagation.head, method.propagation.regions)
    assert parts == ((True, True) if METHODS[name].correlation else (False, False))
    assert any("correlation" in key for key in method.state_dict()) == METHODS[name].correlation


def test_regions_need_a_head_and_pseudo_labels():
    for overrides in (
        ("method=fixmatch", "propagation.regions=true"),
        ("propagation.head=false", "propagation.regions=true"),
    ):
        with pytest.raises(ConfigError, match=r"propagation\.regions: expected propagation\.head=true"):
            build_method(load_config("sample", ["data.root=x", *overrides]), 6)
    supervised = ["data.root=x", "method=supervised", "propagation.head=true", "propagation.regions=true"]
    with pytest.raises(ConfigError, match=r"propagation\.regions: the method makes no pseudo-labels"):
        build_method(load_config("sample", supervised), 6)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_decoder_that_a_method_cannot_have_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^model\.decoder: {name} needs deeplabv3plus"):
        build_method(load_config("sample", ["data.root=x", f"method={name}", *VIT]), 6)


def test_every_method_has_a_page_and_a_test():
    root = Path(__file__).parents[2]
    for name in METHODS:
        assert (root / "docs" / "methods" / f"{name}.md").is_file(), name
        assert name == "supervised" or (Path(__file__).parent / f"test_{name}.py").is_file(), name
        assert (root / "corrmatch" / "methods" / f"{name}.py").is_file(), name


def test_loss_falls(sample, tmp_path):
    """The loss of labelled images falls in every method."""
    for name in METHODS:
        AcceleratorState._reset_state(reset_partial_state=True)
        overrides = (f"method={name}", *ALIVE.get(name, ()), "train.epochs=6", "train.eval_every=6")
        Trainer(small_config(sample, tmp_path / name, *overrides)).run()
        lines = scalars(tmp_path / name)
        first, last = (sum(line["x"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
        assert last < 0.95 * first, name
        assert all(math.isfinite(line["loss"]) for line in lines)


def test_names_are_those_of_the_files():
    assert list(METHODS) == [kind.__module__.rpartition(".")[2] for kind in METHODS.values()]
