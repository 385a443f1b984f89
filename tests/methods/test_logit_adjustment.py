"""`train.logit_adjustment`: supervised terms of logits that are corrected for the frequencies of classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from training import TINY, assert_same, small_config

from corrmatch.config import load_config
from corrmatch.data.classes import log_frequencies
from corrmatch.data.datasets import IGNORE, find_data
from corrmatch.data.whole import Labelled
from corrmatch.methods import METHODS, build_method
from corrmatch.methods.parts import losses
from corrmatch.training.trainer import Trainer


def adjusted(shift, *keys):
    """A supervised method with this adjustment of its classes."""
    config = load_config("sample", [*TINY, "data.root=none", "method=supervised", "train.logit_adjustment=0.5", *keys])
    method = build_method(config, len(shift))
    method.adjustment.copy_(shift)
    return method


def test_frequencies_are_those_of_the_labels(small_sample):
    data = find_data(small_config(small_sample, "unused").data)
    labels = torch.cat([mask.flatten() for _, mask in Labelled(data.labeled, data.table, None)])
    known = labels[labels != IGNORE].long()
    expected = known.bincount(minlength=6) / len(known)
    found = log_frequencies(data)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.where(expected > 0, expected.log(), 0.0))


def test_a_class_without_labels_is_not_adjusted(small_sample):
    data = find_data(small_config(small_sample, "unused").data)
    data.table[data.table == 2] = IGNORE
    found = log_frequencies(data)
    assert found[2] == 0
    torch.testing.assert_close(found.exp().sum() - 1, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_term_equals_its_formula(dtype):
    torch.manual_seed(0)
    shift = 0.5 * torch.tensor([0.7, 0.2, 0.1]).log()
    method = adjusted(shift)
    logits, labels = torch.randn(2, 3, 5, 4, dtype=dtype, requires_grad=True), torch.randint(3, (2, 9, 7))
    labels[0, 0] = IGNORE
    loss = method.supervised(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    wide = F.interpolate(logits.float(), (9, 7), mode="bilinear", align_corners=True) + shift[:, None, None]
    expected = F.cross_entropy(wide, labels, ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_hard_pixels_are_those_of_the_adjusted_logits():
    torch.manual_seed(0)
    shift = 4 * torch.tensor([0.7, 0.2, 0.1]).log()
    method = adjusted(shift, "train.ohem=true", "train.ohem_pixels=7")
    logits, labels = torch.randn(2, 3, 5, 4), torch.randint(3, (2, 9, 7))
    expected = losses.supervised(logits + shift[:, None, None], labels, hard_pixels=7)
    torch.testing.assert_close(method.supervised(logits, labels), expected)


def test_a_classifier_of_frequencies_has_no_preference():
    """Without features, the least loss is at adjusted logits that are the log frequencies: tau = 1 makes z flat."""
    frequencies = torch.tensor([0.6, 0.3, 0.1])
    labels = torch.tensor([0] * 6 + [1] * 3 + [2]).view(1, 2, 5)
    method = adjusted(frequencies.log())
    z = torch.zeros(1, 3, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(method.supervised(z.expand(1, 3, 2, 5), labels), z)
    torch.testing.assert_close(gradient, torch.zeros_like(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_adjusts_its_supervised_terms(name, small_sample, tmp_path):
    """The trainer measures the frequencies once. Both terms on labels see them, and a resumed run keeps them."""
    terms = {}
    for tau in (0.0, 0.5):
        keys = (f"method={name}", f"train.logit_adjustment={tau}", "propagation.head=true")
        run = Trainer(small_config(small_sample, tmp_path / f"run_{tau}", *keys))
        assert (run.method.adjustment is None) == (tau == 0)
        run.advance(run.loader())
        run.save(["last.pt"])
        terms[tau] = run.log.write(1, {})
    torch.testing.assert_close(run.method.adjustment, 0.5 * log_frequencies(run.data))
    for term in {"x", "x_corr"} & terms[0.0].keys():
        assert terms[0.0][term] != terms[0.5][term]
    assert "x" in terms[0.0]
    resumed = Trainer(small_config(small_sample, tmp_path / "run_0.5", *keys), resume=True)
    assert_same({"adjustment": resumed.method.adjustment}, {"adjustment": run.method.adjustment})
