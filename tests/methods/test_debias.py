"""The correction of pseudo-labels for classes that are named too often."""

from __future__ import annotations

import math

import pytest
import torch
from recordings import method_of

from corrmatch.methods.parts.debias import Debias


def logits(seed=0):
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed)) * 3


NO_PADDING = torch.zeros(2, 33, 41, dtype=torch.bool)


def test_the_correction_is_the_logarithm_of_the_mean():
    debias = Debias(3, 0.5)
    debias.mean.copy_(torch.tensor([0.7, 0.2, 0.1]))
    expected = logits() - 0.5 * torch.tensor([math.log(p) for p in (0.7, 0.2, 0.1)])[:, None, None]
    torch.testing.assert_close(debias(logits()), expected)


def test_strength_0_changes_nothing():
    debias = Debias(3, 0.0)
    debias.see(logits(), NO_PADDING)
    debias.finish_step()
    assert torch.equal(debias(logits()), logits())
    assert torch.equal(debias.mean, torch.full((3,), 1 / 3))


def test_before_the_first_step_labels_stay():
    assert torch.equal(Debias(3, 1.0)(logits()).argmax(1), logits().argmax(1))


def test_the_mean_follows_the_probabilities_outside_of_padding():
    debias, padding = Debias(3, 1.0, momentum=0.75), NO_PADDING.clone()
    padding[1] = True  # only the first image counts
    debias.see(logits(), padding)
    debias.finish_step()
    torch.testing.assert_close(debias.mean, 0.75 / 3 + 0.25 * logits()[0].softmax(0).mean((1, 2)))


def test_batches_of_a_step_count_as_one_and_a_step_without_any_moves_nothing():
    one, two = Debias(3, 1.0), Debias(3, 1.0)
    one.see(logits(), NO_PADDING)
    for i in range(2):
        two.see(logits()[i : i + 1], NO_PADDING[:1])
    for debias in (one, two, one):
        debias.finish_step()
    torch.testing.assert_close(one.mean, two.mean)
    assert one.mean.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    debias = Debias(3, 1.0)
    debias.see(logits().to(dtype), NO_PADDING)
    debias.finish_step()
    corrected = debias(logits().to(dtype).requires_grad_())
    assert corrected.dtype == dtype
    assert not corrected.requires_grad
    assert debias.mean.dtype == torch.float32


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "corrmatch"])
def test_methods_label_with_it(name):
    method = method_of(name, 3, torch.nn.Conv2d(1, 1, 1), debias=1.0)
    method.debias.mean.copy_(torch.tensor([0.98, 0.01, 0.01]))
    said = torch.tensor([2.0, 1.0, 0.0]).reshape(1, 3, 1, 1)
    assert said.argmax(1).item() == 0
    assert method.corrected(said).argmax(1).item() == 1
