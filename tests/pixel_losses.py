"""Pixel losses in plain PyTorch and in wide arithmetic, and their tolerances."""

from __future__ import annotations

import layouts
import numpy as np
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from corrmatch import ops

GRID, LARGE = (5, 6), (9, 13)
TERMS = {"pixels": 2, "gradient": 3}  # largest errors, in units of the error of the plain formulation


def plain(name, logits, other, weight):
    """Terms of the loss and gradients of the logits, computed at full size in the dtype of the logits."""
    leaf = logits.detach().requires_grad_()
    large, *rest = (enlarge(x, weight.shape[1:]) for x in (leaf, other)[: 2 if name == "divergence" else 1])
    if name == "divergence":
        terms = F.kl_div(large.log_softmax(1), rest[0].softmax(1), reduction="none").sum(1)
    else:
        terms = F.cross_entropy(large, other.long(), reduction="none")
    terms = terms * weight.to(terms.dtype)
    return terms.detach(), *torch.autograd.grad(terms.sum(), leaf)


def enlarge(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True) if x.shape[2:] != size else x


def run(name, backend, logits, other, weight=None, **options):
    """Terms of the loss and gradients from the op."""
    leaf = layouts.moved(logits.detach(), backend.device).requires_grad_()
    other, weight = (None if x is None else layouts.moved(x, backend.device) for x in (other, weight))
    loss, pixels = getattr(ops, name)(leaf, other, weight, backend=backend.name, **options)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert (loss.dtype, pixels.dtype, loss.shape) == (wide, wide, ())
    assert not pixels.requires_grad
    torch.testing.assert_close(loss.detach(), pixels.sum(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert (gradient.dtype, gradient.shape) == (logits.dtype, logits.shape)
    return pixels.cpu(), gradient.cpu()


def inputs(name, dtype, grid, size=None, batch=3, classes=21):
    """Logits; labels or logits of a target; weights, a third of them 0."""
    size = size or grid
    logits = (torch.randn(batch, classes, *grid) * 3).to(dtype)
    target = (torch.randn(batch, classes, *grid) * 3).to(dtype)
    labels = torch.randint(classes, (batch, *size))
    weight = torch.rand(batch, *size) * (torch.rand(batch, *size) < 0.7)
    weight[:, 0, 0] = 0.5  # at least one pixel counts
    return logits, target if name == "divergence" else labels, weight


def exact(name, logits, other, weight):
    """Terms of the loss and gradients in long double, from the formulas, and the sums of their absolute terms."""
    x, w = logits.double().numpy().astype(np.longdouble), weight.double().numpy().astype(np.longdouble)
    axes = [Axis(small, large) for small, large in zip(x.shape[2:], w.shape[1:], strict=True)]
    w = w[:, None]

    def log_softmax(x):
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    x = enlarged(x, axes)
    log_p = log_softmax(x)
    if name == "divergence":
        log_q = log_softmax(enlarged(other.double().numpy().astype(np.longdouble), axes))
        q = np.exp(log_q)
        pixels, size = (q * (log_q - log_p)).sum(1), (q * (abs(log_q) + abs(log_p))).sum(1)
    else:
        q = (np.arange(x.shape[1])[:, None, None] == other[:, None].numpy()).astype(np.longdouble)
        size = pixels = -(q * log_p).sum(1)
    size = size + abs(log_p).min(1) + abs(x).max(1)
    p = np.exp(log_p)
    spread = [gathered(w * (p + sign * q), axes) for sign in (-1, 1)]
    return (pixels * w[:, 0], spread[0]), (size * w[:, 0], spread[1])


class Axis:
    """Linear enlargement of the last axis with aligned corners."""

    def __init__(self, small, large):
        at, steps = np.arange(large) * (small - 1), max(large - 1, 1)
        weight = (at % steps) / np.longdouble(steps)
        low = at // steps
        self.small = small
        self.neighbours = [(low, 1 - weight), (np.minimum(low + 1, small - 1), weight)]

    def enlarged(self, x):
        return sum(x[..., index] * weight for index, weight in self.neighbours)

    def gathered(self, x):
        """The transpose of `enlarged`."""
        found = np.zeros((*x.shape[:-1], self.small), x.dtype)
        for index, weight in self.neighbours:  # indices ascend: one sum for each that occurs
            starts = np.flatnonzero(np.diff(index, prepend=-1))
            found[..., index[starts]] += np.add.reduceat(x * weight, starts, axis=-1)
        return found


def enlarged(x, axes):
    rows, columns = axes
    return columns.enlarged(rows.enlarged(x.swapaxes(2, 3)).swapaxes(2, 3))


def gathered(x, axes):
    rows, columns = axes
    return rows.gathered(columns.gathered(x).swapaxes(2, 3)).swapaxes(2, 3)


def assert_right(name, found, logits, other, weight):
    oracle, sizes = exact(name, logits, other, weight)
    for (term, factor), mine, right, peer, size in zip(
        TERMS.items(), found, oracle, plain(name, logits, other, weight), sizes, strict=True
    ):
        arrays = [x.reshape(len(x), -1, 1) for x in (mine, right, peer.to(mine.dtype), size)]
        assert_accurate(term, *arrays, factor)
