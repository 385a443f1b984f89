"""Pseudo-labels on disk: the most confident ones of each class, merged with earlier ones and sent through regions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from corrmatch import ops
from corrmatch.config import PropagationConfig
from corrmatch.data.datasets import IGNORE
from corrmatch.masks import RegionMasks
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.rehearsal import (
    Rules,
    Said,
    class_thresholds,
    drop,
    dynamic_weights,
    merge,
    through_regions,
)  # fmt: skip

PUBLISHED = Rules(classes=6, ratio=1.0, gap=0.15, background=0, dropped_loses=False)


def said(labels, confidence):
    return Said(torch.tensor(labels), torch.tensor(confidence))


def test_thresholds_keep_the_share_of_each_class():
    labels, confidence = torch.randint(3, (5000,)), torch.rand(5000)
    for ratio in (0.2, 0.5, 0.8):
        thresholds = class_thresholds(labels, confidence, ratio, 4)
        kept = drop(Said(labels, confidence), thresholds).labels
        for c in range(3):
            count = (labels == c).sum().item()
            assert (kept == c).sum().item() == int(count * ratio) + 1
        assert thresholds[3].item() == pytest.approx(1e-5)
    everything = class_thresholds(labels, confidence, 1.0, 4)
    assert [everything[c].item() for c in range(3)] == [confidence[labels == c].min().item() for c in range(3)]
    assert everything[3].item() == pytest.approx(1e-5)  # published: the end of the run


def test_rules_of_the_merge():
    current = said([1, 0, 2, 2, IGNORE, 0, 2], [0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.1])
    previous = said([0, 1, 1, 1, 1, IGNORE, IGNORE], [1.0, 0.1, 0.7, 0.6, 0.6, 0.1, 0.9])

    def labels(**changes):
        return merge(current, previous, replace(PUBLISHED, **changes)).labels.tolist()

    assert labels() == [1, 1, 1, 2, IGNORE, IGNORE, IGNORE]
    assert labels(dropped_loses=True) == [1, 1, 1, 2, 1, 0, 2]
    assert labels(background=None) == [1, 0, 1, 2, IGNORE, 0, IGNORE]
    assert labels(gap=0.05) == [1, 1, 1, 1, 1, IGNORE, IGNORE]


def test_regions_take_the_smaller_confidence():
    """The result of one region after the other equals that of all at once."""
    torch.manual_seed(1)
    part = Propagation(PropagationConfig(head=True, regions=True, region_threshold=0.5))
    labels, confidence = torch.zeros(1, 12, 12, dtype=torch.long), torch.rand(1, 12, 12)
    labels[:, 6:] = 1
    labels[torch.rand(1, 12, 12) < 0.3] = IGNORE
    boxes = torch.zeros(1, 3, 12, 12, dtype=torch.bool)
    boxes[0, 0, 1:5], boxes[0, 1, 7:11], boxes[0, 2, 4:9] = True, True, True
    valid = torch.ones(1, 12, 12, dtype=torch.bool)
    valid[..., 10:] = False
    masks = RegionMasks.from_bool(boxes)
    found = through_regions(Said(labels, confidence), masks, valid, part, 2)
    kept = labels != IGNORE
    expected, reliable = ops.region_propagate(
        labels.masked_fill(~kept, 0), kept, masks, 0.5, num_classes=2, valid=valid
    )
    assert torch.equal(found.labels, expected.masked_fill(~reliable, IGNORE))
    changed = found.labels != labels
    assert changed.any()
    assert not changed[..., 10:].any()
    assert torch.equal(found.confidence[~changed], confidence[~changed])
    alone = boxes[:, 0] & ~boxes[:, 2] & changed  # of one region only
    mean = confidence[boxes[:, 0] & valid].mean()
    torch.testing.assert_close(found.confidence[alone], confidence[alone].clamp(max=mean))


def test_weights_are_those_of_the_formula():
    logits, labels = torch.randn(2, 6, 9, 9), torch.randint(6, (2, 17, 17))
    confidence = torch.rand(2, 17, 17)
    labels[:, :3] = IGNORE
    weight, disagree, surer = dynamic_weights(logits, labels, confidence, (3, 2))
    p = nn.functional.interpolate(logits, (17, 17), mode="bilinear", align_corners=True).softmax(1)
    own = p.gather(1, labels.clamp(max=5)[:, None])[:, 0]
    for x in (weight, disagree, surer):
        assert not x[:, :3].any()
    body = torch.ones_like(disagree)
    body[:, :3] = False
    agree = body & ~disagree
    assert torch.equal(p.argmax(1)[agree], labels[agree])
    torch.testing.assert_close(weight[agree], own[agree] ** 3)
    torch.testing.assert_close(weight[disagree & ~surer], own[disagree & ~surer] ** 2)
    assert surer.any()
    assert not weight[surer].any()
    assert torch.equal(surer, disagree & (p.amax(1) > confidence))
