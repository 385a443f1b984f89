"""The alignment of the class frequencies of pseudo-labels with those of labels."""

from __future__ import annotations

import pytest
import torch
from recordings import method_of

from corrmatch.methods.parts.alignment import Alignment
from corrmatch.models.network import Prediction

NO_PADDING = torch.zeros(2, 33, 41, dtype=torch.bool)


def logits(seed=0):
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed)) * 3


def truth(*counts):
    """Labels with the given number of pixels of each class, and the same number of ignored pixels."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.cat([labels, torch.full((sum(counts),), 255)]).view(2, 1, -1).to(torch.uint8)


def aligned(power=0.5, *, labels=(64, 16, 4), mean=(0.7, 0.2, 0.1)):
    alignment = Alignment(3, power)
    alignment.labels.copy_(torch.tensor(labels))
    alignment.mean.copy_(torch.tensor(mean))
    return alignment


@pytest.mark.parametrize(
    ("power", "target"), [(1.0, (64 / 84, 16 / 84, 4 / 84)), (0.5, (8 / 14, 4 / 14, 2 / 14)), (0.0, (1 / 3,) * 3)]
)
def test_logits_move_by_the_logarithm_of_the_ratio(power, target):
    expected = logits() + (torch.tensor(target) / torch.tensor([0.7, 0.2, 0.1])).log()[:, None, None]
    torch.testing.assert_close(aligned(power)(logits()), expected)


def test_a_network_that_is_aligned_is_not_corrected():
    alignment = aligned()
    alignment.mean.copy_(alignment.target())
    assert torch.equal(alignment(logits()), logits())


def test_before_the_first_step_labels_stay():
    alignment = Alignment(3, 0.5)
    assert torch.equal(alignment(logits()), logits())
    alignment.see_labels(truth(6, 4, 2))
    alignment.finish_step()  # labels are known, but not yet what the network says
    assert torch.equal(alignment(logits()), logits())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_class_without_labels_is_never_named(power):
    corrected = aligned(power, labels=(64, 0, 4), mean=(0.5, 1e-45, 0.5))(logits())
    assert (corrected[:, 1] == -torch.inf).all()
    assert corrected[:, [0, 2]].isfinite().all()


def test_the_mean_follows_the_probabilities_outside_of_padding():
    alignment, padding = Alignment(3, 1.0, momentum=0.75), NO_PADDING.clone()
    padding[1] = True  # only the first image counts
    alignment.see_labels(truth(6, 4, 2))
    alignment.see(logits(), padding)
    alignment.finish_step()
    start = torch.tensor([6, 4, 2]) / 12
    torch.testing.assert_close(alignment.mean, 0.75 * start + 0.25 * logits()[0].softmax(0).mean((1, 2)))
    assert alignment.labels.tolist() == [6, 4, 2]


def test_batches_of_a_step_count_as_one_and_a_step_without_any_moves_nothing():
    one, two = aligned(), aligned()
    one.see(logits(), NO_PADDING)
    one.see_labels(truth(4, 4, 4))
    for i in range(2):
        two.see(logits()[i : i + 1], NO_PADDING[:1])
        two.see_labels(truth(2, 2, 2))
    for alignment in (one, two, one):
        alignment.finish_step()
    torch.testing.assert_close(one.mean, two.mean)
    assert one.mean.sum().item() == pytest.approx(1)
    assert one.labels.tolist() == two.labels.tolist() == [68, 20, 8]


def test_it_ends_by_itself():
    """A network copies its pseudo-labels, as in self-training. The frequencies converge. With a fixed correction they
    would not.
    """
    alignment = aligned(labels=(900, 90, 10), mean=(0.9, 0.09, 0.01))
    said = (
        torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        + torch.tensor([3.0, 1, -1])[:, None, None]
    )
    ignore = torch.zeros(4, 16, 16, dtype=torch.bool)
    for _ in range(2000):
        alignment.see(said, ignore)
        said = said + 0.05 * (alignment(said) - said)
        alignment.finish_step()
    torch.testing.assert_close(alignment.mean, alignment.target(), rtol=0, atol=1e-3)
    torch.testing.assert_close(said.softmax(1).mean((0, 2, 3)), alignment.target(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    alignment = aligned()
    alignment.see(logits().to(dtype), NO_PADDING)
    alignment.finish_step()
    corrected = alignment(logits().to(dtype).requires_grad_())
    assert corrected.dtype == dtype
    assert not corrected.requires_grad
    assert alignment.mean.dtype == torch.float32


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2", "corrmatch"])
def test_methods_label_with_it(name):
    network = torch.nn.Conv2d(1, 1, 1)
    method = method_of(name, 3, network, align=0.5)
    method.alignment.mean.copy_(torch.tensor([0.98, 0.01, 0.01]))
    method.alignment.labels.copy_(torch.tensor([4, 4, 4]))
    said = torch.tensor([2.0, 1.0, 0.0]).reshape(1, 3, 1, 1)
    assert said.argmax(1).item() == 0
    assert method.corrected(Prediction(said)).argmax(1).item() == 1
    plain = method_of(name, 3, network)
    assert plain.alignment is None
    assert torch.equal(plain.corrected(Prediction(said)), said)
