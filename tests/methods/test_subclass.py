"""Unbiased subclass regularisation, compared with recordings of the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recordings import folder, load, progress, recorded, relative
from torch import nn
from torchvision import tv_tensors

from corrmatch.config import ConfigError, load_config
from corrmatch.data.datasets import IGNORE
from corrmatch.data.views import seeded
from corrmatch.methods import build_method
from corrmatch.methods.parts import subclass_maps as stage
from corrmatch.methods.parts.pseudo_labels import half, nearest
from corrmatch.methods.subclass import Answer, Judgement, gated, parents_of
from corrmatch.models.network import Prediction, evaluating
from corrmatch.training.optimization import make_optimizer, make_schedule, rates

FILES = recorded("48_usrn_*")
PATHS = sorted(folder().glob("48_usrn_*.npz"))
NETWORK = ("model.backbone=test_resnet", "model.pretrained=false", "model.output_stride=16", "model.channels=12")
VIEWS = {"l": "known", "s": "strong", "w": "weak"}


def method_of(classes, *overrides):
    config = load_config("folder", ["data.root=x", "method=subclass", "subclass.dropout=0", *NETWORK, *overrides])
    return build_method(config, classes)


def recorded_method(at, *overrides):
    """The method with the recorded classifiers. Its networks return the recorded features, view by view."""
    method = method_of(len(at["split"]), *overrides)
    method.divide(at["split"].tolist())
    for network, kind in ((method.model, ""), (method.branch, "_sub")):
        conv = nn.Conv2d(12, at[f"bias{kind}"].shape[0], 1)
        conv.weight.data, conv.bias.data = at[f"weight{kind}"].clone(), at[f"bias{kind}"].clone()
        network.decode[-1] = conv
    features = {f"{kind}{view}": at[f"{kind}{view}"].clone().requires_grad_() for view in VIEWS
                for kind in ("feat_", "feat_sub_")}  # fmt: skip
    asked = []

    def ask(images, correlate):
        view = list(VIEWS)[len(asked)]
        asked.append((images, torch.is_grad_enabled(), method.training))
        first, second = (features[f"{kind}{view}"] for kind in ("feat_", "feat_sub_"))
        return Answer(Prediction(method.model.classifier(first), features=first), Prediction(first, features=second))

    method.ask = ask
    return method, features, asked


def batch_of(at):
    images, (height, width) = torch.rand(3, 2, 3, 4, 4), at["label"].shape[1:]
    return images, {
        "labeled": {"image": images[0], "label": at["label"], "subclass": at["label_sub"]},
        "unlabeled": {"strong": images[1][:, None], "weak": images[2], "ignore": torch.zeros(2, height, width) > 0},
    }


@FILES
@pytest.mark.parametrize("prefix", ["a_", "b_"])
def test_recorded_steps(path, prefix, monkeypatch):
    at = load(path, prefix)
    with np.load(path) as file:
        at |= {
            name: torch.from_numpy(file[f"{prefix}{name}"]) for name in ("used_reg", "used_sub", "weak_grad_is_none")
        }
    method, features, asked = recorded_method(at)
    images, batch = batch_of(at)
    kept = []
    monkeypatch.setattr(method, "targets", lambda *a, f=method.targets: kept.append((a[0], f(*a))) or kept[-1][1])
    loss, scalars = method.train()(batch, progress(phase=1))
    expected = {"x": "Ls", "x_sub": "Ls_sub", "u": "Lu_reg", "u_sub": "Lu_sub", "loss": "total"}
    for name, key in expected.items():
        assert scalars[name].item() == pytest.approx(at[key].item(), rel=1e-6)
    loss.backward()
    for name, leaf in features.items():
        if name.endswith("_w"):
            assert leaf.grad is None
            assert not at[f"grad_{name}"].any()
        else:
            assert relative(leaf.grad, at[f"grad_{name}"]) < 1e-5
    assert at["weak_grad_is_none"].all()
    for network, kind in ((method.model, ""), (method.branch, "_sub")):
        assert relative(network.classifier.weight.grad, at[f"grad_weight{kind}"]) < 1e-5
        assert relative(network.classifier.bias.grad, at[f"grad_bias{kind}"]) < 1e-5
    ((said, (labels, used, counted)),) = kept
    assert torch.equal(said.subclass, at["pseudo_sub"])
    assert torch.equal(used, at["used_reg"])
    assert torch.equal(labels[used], at["pseudo_reg"][used])
    assert torch.equal(said.confidence > 0.75, at["used_sub"])
    assert counted.all()
    for kind, found in (("entropy", said.entropy), ("entropy_sub", said.sub_entropy)):
        assert relative(found, at[kind]) < 1e-6
    closed = said.sub_entropy <= said.entropy
    sure = said.p.amax(1) > 0.75
    assert closed.any()
    assert (used & ~closed).any()
    assert (sure & ~used).any()  # vetoed
    for network, kind in ((method.model, ""), (method.branch, "_sub")):
        found = method.classify(network, half(features[f"feat{kind}_s"]))
        assert relative(found, at[f"logits{kind}_s"]) < 1e-6
    assert [grad for _, grad, _ in asked] == [True, True, False]
    assert all(training for _, _, training in asked)
    assert all(torch.equal(given, image) for (given, _, _), image in zip(asked, images, strict=True))


@FILES
def test_recorded_parents(path):
    at = load(path)
    names = [name.removeprefix("counts_") for name in at if name.startswith("counts_")]
    assert len(names) == 6
    for name in names:
        assert torch.equal(parents_of(at[f"counts_{name}"].tolist()), at[f"parent_{name}"])


@FILES
def test_recorded_schedule(path):
    """Rates of heads and backbone over five epochs of seven steps. Copied stages have the backbone's rate."""
    method, train = method_of(3), load_config("pascal_320_subclass", ["data.root=x"]).train
    method.requires_grad_(False)
    for p in method.trains(1):
        p.requires_grad_(True)
    optimizer = make_optimizer(method.parameter_groups(train), train)
    schedule, rows = make_schedule(optimizer, train, 35), load(path)["sched_lr"]
    for row in rows:
        found = rates(optimizer)
        assert [found["lr_head"], found["lr_backbone"]] == pytest.approx(row.tolist(), rel=1e-12)
        optimizer.step()
        schedule.step()
    backbone = {id(p) for p in optimizer.param_groups[0]["params"]}
    inside = [*method.model.backbone.parameters(), *method.branch.backbone.parameters()]
    assert backbone == {id(p) for p in inside}


@FILES
def test_recorded_sizes(path):
    """Labels of features are those of the nearest pixel. Labels of pixels are those of the nearest feature."""
    at = load(path, "resize_")
    assert torch.equal(nearest(at["label"][None], at["down"].shape)[0], at["down"])
    assert torch.equal(nearest(at["down"][None], at["up"].shape)[0], at["up"])


@FILES
def test_shipped_counts(path):
    at = load(path)
    for name, kind in (("pascal_320_subclass", "voc_331"), ("cityscapes_720_subclass", "city_372")):
        assert load_config(name, ["data.root=x"]).subclass.counts == at[f"counts_{kind}"].tolist()


def test_branches_share_their_first_stages():
    method = method_of(3).train()
    images = torch.randn(2, 3, 49, 49)
    with evaluating(method):
        low, high = method.model.features(images)
        torch.testing.assert_close(method.branch.features(low)[1], high)  # the others are copies to begin with
    answer = method.ask(images, False)
    assert answer.features.shape == answer.subfeatures.shape == (2, 12, 13, 13)
    kept = {name.split(".")[2] for name, _ in method.named_parameters() if name.startswith("branch.backbone.")}
    assert kept == {"layer2", "layer3", "layer4"}
    answer.subfeatures.sum().backward()
    assert method.model.backbone.conv1[0].weight.grad.any()
    assert all(p.grad is None for p in method.model.backbone.layer2.parameters())


def test_the_gate_as_its_definition_says():
    """Definition (6): where the subclass branch is no less certain, only one class keeps its probability. For low
    thresholds too.
    """
    p, own = torch.randn(2, 4, 5, 6).mul(2).softmax(1), torch.randint(7, (2, 5, 6))
    parents = parents_of([1, 3, 1, 2])
    said = Judgement(p, own, torch.rand(2, 5, 6), torch.rand(2, 5, 6), torch.rand(2, 5, 6))
    closed = (said.sub_entropy <= said.entropy).unsqueeze(1)
    alone = torch.nn.functional.one_hot(parents[own], 4).movedim(-1, 1) == 0
    expected = p.masked_fill(closed & alone, 0)
    labels, confidence = gated(said, parents)
    assert torch.equal(labels, expected.argmax(1))
    assert torch.equal(confidence, expected.amax(1))


def test_padding_counts_unless_it_is_masked():
    for path in PATHS:
        for masked in (False, True):
            at = load(path, "a_")
            method, _, _ = recorded_method(at, f"subclass.mask_padding={masked}")
            _, batch = batch_of(at)
            batch["unlabeled"]["ignore"][:, 16:] = True  # of 40 rows; at stride 8 three of five
            _, found = method.train()(batch, progress(phase=1))
            with np.load(path) as file:
                used = torch.from_numpy(file["a_used_sub"])
            used[:, 2:] &= not masked
            loss = nn.functional.cross_entropy(at["logits_sub_s"], at["pseudo_sub"], reduction="none")
            positions = 2 * 5 * (2 if masked else 5)
            assert found["u_sub"].item() == pytest.approx(((loss * used).sum() / positions).item(), rel=1e-5)


def test_regions_leave_the_veto_to_the_seeds():
    """A rejected pixel is no seed. Regions may still label it."""
    at = load(PATHS[0], "a_")
    method, _, _ = recorded_method(at)
    said = Judgement(
        torch.tensor([0.9, 0.1]).view(1, 2, 1, 1).expand(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.int64),
        torch.full((1, 4, 4), 0.9), torch.ones(1, 4, 4), torch.zeros(1, 4, 4),
    )  # fmt: skip
    method.parents = torch.tensor([0, 1])
    method.classes = 2
    method.propagation.regions = True
    query = torch.randn(1, 3, 2, 2)
    weak = Answer(Prediction(said.p, query=query, key=query), Prediction(said.p))
    ignore = torch.zeros(1, 8, 8, dtype=torch.bool)
    _, used, counted = method.targets(said, weak, ignore, progress())
    assert not used.any()  # every pixel is vetoed: class 0 by p, class 1 by its subclass
    assert counted.all()
    said = said._replace(sub_entropy=torch.full((1, 4, 4), 2.0))
    labels, used, _ = method.targets(said, weak, ignore, progress())
    assert used.all()
    assert not labels.any()


def test_shares_of_classes():
    assert stage.by_share(np.array([100, 1000, 149, 151, 0, 40]), 200) == [1, 7, 1, 1, 1, 1]  # the median is 149
    assert stage.by_share(np.array([10, 100_000, 10]), 50) == [1, 48, 1]
    assert stage.by_share(np.array([5, 5]), 2) == [1, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("subclass.counts=[1,2]", r"subclass\.counts: expected 3 numbers, one a class, got 2"),
        ("subclass.counts=[1,2,253]", r"subclass\.counts: expected 255 subclasses at most, got 256"),
        ("subclass.most=2", r"subclass\.most: expected one for each of the 3 classes, got 2"),
    ],
)
def test_counts_that_cannot_be_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        method_of(3, override)


def test_a_transformer_has_no_stages_to_share():
    vit = ("model.decoder=dpt", "model.backbone=test_vit", "model.channels=8")
    with pytest.raises(ConfigError, match=r"model\.decoder: subclass needs deeplabv3plus"):
        method_of(3, *vit)


def test_views():
    """The longer side is the base size times the scale. Subclasses lie on the labels of their classes."""
    method = method_of(3, "subclass.base=100", "train.crop=64")
    known, weak = (method.streams()[name].view for name in ("labeled", "unlabeled"))
    assert known.geometry.scales == pytest.approx((50 / 64, 200 / 64))
    assert weak.geometry.scales == pytest.approx((80 / 64, 200 / 64))
    ids = torch.randint(3, (60, 90), dtype=torch.uint8)
    image = torch.randint(256, (3, 60, 90), dtype=torch.uint8)
    image, mask, sub = tv_tensors.Image(image), tv_tensors.Mask(ids), tv_tensors.Mask(ids + 10)
    for seed in range(20):
        with seeded(seed):
            view = known(image, mask, 64, {"subclass": sub})
        inside = view["label"] != IGNORE
        assert inside.any()
        assert torch.equal(view["subclass"][inside], view["label"][inside] + 10)
        assert (view["subclass"][~inside] == IGNORE).all()
    with seeded(0):
        views = [weak(image, None, 64) for _ in range(12)]
    assert all(view["strong"].shape == (1, 3, 64, 64) for view in views)
    changed = [not torch.equal(view["strong"][0], view["weak"]) for view in views]
    assert any(changed)
    assert method_of(3, "subclass.jitter=true").streams()["labeled"].view.weak is not None
