"""Thresholds of classes: a share of the pixels of each class counts."""

from __future__ import annotations

import math

import pytest
import torch
from recordings import method_of
from training import small_config

from corrmatch.config import ConfigError, load_config
from corrmatch.methods import build_method
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.methods.parts.threshold import BINS, ClassThreshold
from corrmatch.training.trainer import Trainer


def pseudo_labels(seed=0, classes=4, batch=2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch, 33, 31), generator=generator, dtype=torch.uint8)
    # Each class is sure of itself in its own way: class 0 up to 1/4, class 3 up to 1.
    confidence = torch.rand(labels.shape, generator=generator) * (labels + 1) / classes
    return PseudoLabels(labels, confidence, torch.rand(labels.shape, generator=generator) < 0.2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_each_class_counts(share):
    theta, pseudo = ClassThreshold(4, 0.9, share, momentum=0.0), pseudo_labels()
    theta.see(pseudo)
    theta.finish_step()
    for c in range(4):
        values = pseudo.confidence[(pseudo.labels == c) & pseudo.counted].sort(descending=True).values
        exact = values[math.ceil(share * len(values)) - 1]
        assert exact - 1 / BINS <= theta.threshold[c] <= exact
    kept = pseudo.reliable(theta.threshold)
    for c in range(4):
        of_class = (pseudo.labels == c) & pseudo.counted
        assert share <= kept[of_class].float().mean() < share + 0.05


def test_everything_counts_at_a_share_of_one():
    theta, pseudo = ClassThreshold(4, 0.9, 1.0, momentum=0.0), pseudo_labels()
    theta.see(pseudo)
    theta.finish_step()
    assert torch.equal(pseudo.reliable(theta.threshold), pseudo.counted)


def test_batches_of_a_step_count_as_one():
    one, two, pseudo = ClassThreshold(4, 0.9, 0.5), ClassThreshold(4, 0.9, 0.5), pseudo_labels()
    one.see(pseudo)
    for i in range(2):
        two.see(pseudo.taken(torch.tensor([i])))
        assert torch.equal(two.threshold, torch.full((4,), 0.9))  # within a step: as before
    for theta in (one, two):
        theta.finish_step()
    assert torch.equal(one.threshold, two.threshold)
    assert (one.threshold != 0.9).all()


def test_a_class_without_pixels_keeps_its_threshold_and_others_move_by_the_momentum():
    theta, pseudo = ClassThreshold(6, 0.9, 0.5, momentum=0.75), pseudo_labels()
    at_once = ClassThreshold(6, 0.9, 0.5, momentum=0.0)
    for x in (theta, at_once):
        x.see(pseudo)
        x.finish_step()
    assert theta.threshold[4:].tolist() == pytest.approx([0.9, 0.9])
    torch.testing.assert_close(theta.threshold[:4], 0.75 * 0.9 + 0.25 * at_once.threshold[:4])
    theta.finish_step()  # a step without a batch
    torch.testing.assert_close(theta.threshold[:4], 0.75 * 0.9 + 0.25 * at_once.threshold[:4])


def test_confidence_of_one_and_of_zero_have_bins():
    pseudo = PseudoLabels(
        torch.zeros(1, 1, 2, dtype=torch.uint8), torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2) > 0
    )
    for share, expected in ((0.5, (BINS - 1) / BINS), (1.0, 0.0)):
        theta = ClassThreshold(1, 0.5, share, momentum=0.0)
        theta.see(pseudo)
        theta.finish_step()
        assert theta.threshold.item() == pytest.approx(expected)


@pytest.mark.parametrize("method", ["corrmatch", "fixmatch", "unimatch", "unimatch_v2"])
def test_regions_need_a_threshold_of_their_own(method):
    overrides = [f"method={method}", f"{method}.class_share=0.5", "propagation.head=true", "propagation.regions=true"]
    overrides += ["data.root=x", "model.backbone=test_resnet", "model.pretrained=false"]
    with pytest.raises(ConfigError, match=r"^propagation\.region_threshold: expected a value"):
        build_method(load_config("folder", overrides), 3)
    build_method(load_config("folder", [*overrides, "propagation.region_threshold=0.7"]), 3)


def test_diagnostics_and_panels_get_the_thresholds_of_the_classes():
    method = method_of("fixmatch", 5, torch.nn.Conv2d(1, 1, 1), class_share=0.5)
    assert method.threshold.shape == (5,)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2", "corrmatch"])
def test_thresholds_of_classes_follow_the_pseudo_labels_of_a_step(name, small_sample, tmp_path, monkeypatch):
    """Each method shows its weak views' labels once a batch, and updates the thresholds once a step."""
    keys = (f"{name}.class_share=0.5", "propagation.region_threshold=0.5", "train.accumulate=2")
    run = Trainer(small_config(small_sample, tmp_path, f"method={name}", *keys))
    expected, see, shown = ClassThreshold(6, run.method.options.threshold, 0.5), ClassThreshold.see, []

    def watched(thresholds, pseudo):
        shown.append(pseudo)
        see(thresholds, pseudo)

    monkeypatch.setattr(ClassThreshold, "see", watched)
    before, loader = run.method.threshold.clone(), run.loader()
    run.advance(loader)
    assert len(shown) == 2
    for pseudo in shown:
        assert pseudo.labels.shape == (2, 49, 49)
        see(expected, pseudo)
    expected.finish_step()
    assert torch.equal(run.method.threshold, expected.threshold)
    assert not torch.equal(run.method.threshold, before)
