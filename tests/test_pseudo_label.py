"""Pseudo-labels compared with softmax and enlargement in float64."""

from __future__ import annotations

import layouts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from corrmatch import ops

OP = "pseudo_label"
SIZES = [
    ((33, 49), None),
    ((9, 9), (65, 65)),
    ((9, 9), (9, 9)),
    ((12, 10), (50, 37)),
    ((12, 10), (13, 11)),
    ((12, 10), (5, 7)),
    ((12, 100), (12, 11)),
    ((7, 40), (19, 23)),
    ((1, 1), (6, 5)),
    ((1, 7), (1, 30)),
    ((7, 1), (20, 1)),
    ((6, 5), (1, 1)),
    ((6, 5), (1, 40)),
    ((2, 2), (33, 129)),
]


def plain(logits, size):
    if size is not None:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    return logits.softmax(1)


def label(backend, logits, **options):
    options = {k: layouts.moved(v, backend.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logits = layouts.moved(logits, backend.device)
    labels, confidence, peak = ops.pseudo_label(logits, backend=backend.name, **options)
    size = options.get("size") or tuple(logits.shape[2:])
    assert (labels.dtype, confidence.dtype, peak.dtype) == (torch.int64, torch.float32, torch.float32)
    assert labels.shape == confidence.shape == (logits.shape[0], *size)
    assert peak.shape == (logits.shape[1],)
    return labels.cpu(), confidence.cpu(), peak.cpu()


def assert_right(found, logits, size=None, ignore=None):
    labels, confidence, peak = found
    exact = plain(logits.double(), size)
    best, chosen = exact.max(1).values, exact.gather(1, labels.unsqueeze(1)).squeeze(1)
    # The largest class, except for ties up to rounding errors in the dtype of the enlargement.
    margin = 1e-12 if logits.dtype == torch.float64 else 1e-5
    assert (chosen >= best * (1 - margin)).all()

    peer = plain(logits, size).max(1).values.to(torch.float32)
    best = best.unsqueeze(1).numpy()
    assert_accurate("confidence", confidence.unsqueeze(1), best.reshape(len(best), 1, -1), peer.unsqueeze(1), best, 2)

    # Peaks are exactly the largest of the confidences that were returned.
    counted = confidence if ignore is None else torch.where(ignore, 0, confidence)
    expected = torch.zeros(logits.shape[1]).scatter_reduce(0, labels.flatten(), counted.flatten(), "amax")
    assert torch.equal(peak, expected)


@pytest.mark.parametrize(("grid", "size"), SIZES, ids=str)
def test_labels_confidence_and_peaks(backend, dtype, grid, size):
    logits = (torch.randn(3, 21, *grid) * 3).to(dtype)
    ignore = torch.rand(3, *(size or grid)) < 0.3
    assert_right(label(backend, logits, size=size), logits, size)
    assert_right(label(backend, logits, size=size, ignore=ignore), logits, size, ignore)


@pytest.mark.parametrize("classes", [1, 2, 3, 19, 150, 256])
@pytest.mark.parametrize("size", [None, (23, 31)])
def test_number_of_classes(backend, dtype, classes, size):
    logits = (torch.randn(2, classes, 9, 11) * 3).to(dtype)
    assert_right(label(backend, logits, size=size), logits, size)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_range_of_logits(backend, dtype, scale):
    logits = (torch.randn(2, 7, 9, 11) * scale).to(dtype)
    found = label(backend, logits)
    assert_right(found, logits)
    assert ((found[1] > 1 / 7 - 1e-6) & (found[1] <= 1)).all()


@pytest.mark.parametrize("size", [None, (27, 41)])
def test_ties_go_to_the_lowest_class(backend, dtype, size):
    logits = torch.randint(-2, 3, (2, 6, 9, 11)).to(dtype)
    if size is not None:  # a constant image stays exact
        logits = logits[:, :, :1, :1].expand(2, 6, 9, 11)
    labels, _, _ = label(backend, logits, size=size)
    wide = logits.double().numpy()
    expected = np.argmax(wide, 1) if size is None else np.broadcast_to(np.argmax(wide, 1)[:, :1, :1], (2, *size))
    assert np.array_equal(labels.numpy(), expected)


def test_classes_that_are_absent_or_ignored_have_no_peak(backend):
    logits = torch.full((2, 5, 8, 9), -3.0)
    logits[:, 1] = 2
    logits[0, 3, 2:4] = 7
    ignore = torch.zeros(2, 8, 9, dtype=torch.bool)
    ignore[0, 2:4] = True
    one, three = (plain(logits.double(), None)[0, c, y, 0].float() for c, y in ((1, 0), (3, 2)))
    _, _, peak = label(backend, logits)
    torch.testing.assert_close(peak, torch.tensor([0, one, 0, three, 0]))
    _, _, peak = label(backend, logits, ignore=ignore)
    torch.testing.assert_close(peak, torch.tensor([0, one, 0, 0, 0]))
    labels, confidence, peak = label(backend, logits, ignore=torch.ones_like(ignore))
    assert torch.equal(peak, torch.zeros(5))
    assert (labels[0, 2] == 3).all()  # ignored pixels have labels and confidence, too
    assert (confidence > 0.9).all()


@pytest.mark.parametrize("where", range(0, 72, 5))
def test_a_peak_is_found_wherever_it_is(backend, where):
    logits = torch.zeros(1, 3, 8, 9)
    logits[0, 2].view(-1)[where] = 4
    labels, confidence, peak = label(backend, logits)
    assert labels.flatten().nonzero().flatten().tolist() == [where]
    assert peak[2] == confidence.flatten()[where] == confidence.max()
    ignore = torch.zeros(1, 8, 9, dtype=torch.bool)
    ignore.view(-1)[where] = True
    assert label(backend, logits, ignore=ignore)[2][2] == 0


@pytest.mark.parametrize("size", [None, (27, 41), (5, 6)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_logits_stay_where_they_are(backend, dtype, bad, size):
    logits = torch.randn(2, 6, 9, 11).to(dtype)
    clean = label(backend, logits, size=size)
    logits[1, 4, 3, 5] = bad
    labels, confidence, peak = label(backend, logits, size=size)
    assert ((labels >= 0) & (labels < 6)).all()
    logits[1, 4, 3, 5] = float("nan")
    near = plain(logits.double(), size).isnan().any(1)
    if bad == -float("inf"):  # a class that is out of the question; between it and others there is no number
        assert not confidence[~near].isnan().any()
        assert size is not None or not confidence.isnan().any()
    else:
        assert torch.equal(confidence.isnan(), near)
    assert torch.equal(labels[~near], clean[0][~near])
    assert torch.equal(confidence[~near], clean[1][~near])
    for c in range(6):  # a NaN is not ignored
        chosen = confidence[labels == c]
        assert peak[c].isnan() == chosen.isnan().any()


def test_classes_that_are_out_of_the_question(backend, dtype):
    """Logits of -inf do not affect the others, even if they come first."""
    logits = torch.randn(2, 6, 9, 11).to(dtype)
    logits[:, [0, 1, 4]] = -float("inf")
    labels, confidence, peak = label(backend, logits)
    assert_right((labels, confidence, peak), logits)
    assert (peak[[0, 1, 4]] == 0).all()


def test_all_logits_bad(backend, dtype):
    for bad in (float("nan"), float("inf"), float("-inf")):
        labels, confidence, _ = label(backend, torch.full((1, 5, 6, 7), bad).to(dtype))
        assert ((labels >= 0) & (labels < 5)).all()
        assert confidence.isnan().all()


def test_empty_batch(backend, dtype):
    labels, _, peak = label(backend, torch.zeros(0, 5, 6, 7).to(dtype), size=(9, 9))
    assert labels.shape == (0, 9, 9)
    assert torch.equal(peak, torch.zeros(5))


@pytest.mark.parametrize("layout", layouts.MAPS)
@pytest.mark.parametrize("size", [None, (27, 41)])
def test_layouts(backend, dtype, layout, size):
    logits = torch.randn(2, 6, 9, 11).to(dtype)
    ignore = torch.rand(2, *(size or (9, 11))) < 0.5
    expected = label(backend, logits, size=size, ignore=ignore)
    place = layouts.ANY.get(layout, layouts.sliced)
    found = label(backend, layouts.MAPS[layout](logits), size=size, ignore=place(ignore))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if backend.exact else 1e-6, atol=0 if backend.exact else 1e-7)


def test_expanded_logits(backend):
    logits = torch.randn(1, 6, 1, 11)
    expanded = logits.expand(2, 6, 9, 11)
    found = label(backend, expanded, ignore=torch.tensor([[[False]], [[True]]]).expand(2, 9, 11))
    expected = label(backend, expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e-9])
def test_the_largest_class_though_probabilities_are_equal(backend, size):
    """Probabilities of almost equal logits round to the same number. The label is that of the largest logit."""
    logits = torch.randperm(7).float().view(1, 7, 1, 1).expand(1, 7, 3, 4) * size
    labels, confidence, _ = label(backend, logits)
    assert torch.equal(labels, logits.argmax(1))
    torch.testing.assert_close(confidence, torch.full((1, 3, 4), 1 / 7))
