"""Losses of logits on a grid smaller than the image: cross-entropy and divergence of the enlarged logits."""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch import _C, reference
from corrmatch.dtypes import accumulation_dtype
from corrmatch.ops import checks
from corrmatch.ops.backend import HALF_AND_SINGLE, call, choose, implementation, kernels, run_on_cpu
from corrmatch.ops.borrowing import borrow
from corrmatch.ops.registration import register


def cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Weighted cross-entropy of logits that are enlarged to the size of the labels, without storing them at this size.

    .. math::
        L = \sum_p w_p \left( -\log \operatorname{softmax}(\hat x_p)_{y_p} \right), \qquad
        \hat x = \text{logits, enlarged bilinearly (align\_corners=True)}

    Pixels of weight 0 are ignored, whatever their logits and label. For a mean over N pixels pass weights of 1/N. The
    gradient is computed together with the loss, on the grid of the logits. Neither enlarged logits nor their softmax
    are ever stored.

    Args:
        logits: (B, C, h, w); float16, bfloat16, float32, or float64 on a CPU; any strides.
        labels: Integer (B, H, W), in [0, C) where the weight is not 0. Where (H, W) is (h, w) nothing is enlarged.
        weight: Floating (B, H, W), without a gradient; 1 everywhere if None.
        backend: "cpu", "triton", "reference", or None for the best available.

    Returns:
        The loss L, 0-d, and its terms (B, H, W), one for each pixel, which have no gradient. Both are computed and
        returned in float32 (float64 for float64 logits).

    Gradients flow to the logits: the sum over the pixels around a grid point of w (softmax - one_hot) times the weight
    of the enlargement. They are the same from run to run. Second and forward-mode derivatives raise RuntimeError.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device, backend or label (on a CPU, or with
            CORRMATCH_CHECK=1); the message names the argument.

    Source: the supervised and pseudo-supervised losses of CorrMatch (CVPR 2024, arXiv 2306.04300).
    """
    checks.feature_map("logits", logits, flat=False)
    _check_pixels("labels", labels, checks.INTEGER, logits)
    if weight is None:
        weight = _ones(logits, labels.shape)
    _check_pixels("weight", weight, checks.FLOATING, logits)
    if weight.shape != labels.shape:
        raise ValueError(f"weight: expected shape {tuple(labels.shape)} as labels, got {tuple(weight.shape)}")
    return _loss(logits, labels, None, weight, choose("pixel_loss", backend, logits))


def divergence(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Weighted Kullback-Leibler divergence of a target's softmax and that of logits, both enlarged to the weights.

    .. math::
        L = \sum_p w_p \sum_c q_{cp} \log \frac{q_{cp}}{p_{cp}}, \qquad
        p = \operatorname{softmax}(\hat x), \quad q = \operatorname{softmax}(\hat t), \quad 0 \log 0 = 0

    Args:
        logits: (B, C, h, w), as for `cross_entropy`.
        target: (B, C, h, w), logits of the distribution to approach; without a gradient.
        weight: Floating (B, H, W), without a gradient: both are enlarged bilinearly (align_corners=True) to (H, W).
            If None, 1 everywhere on the grid of the logits.
        backend: "cpu", "triton", "reference", or None for the best available.

    Returns:
        Loss and terms like those of `cross_entropy`. Gradients flow to the logits: w (p - q), summed over the pixels
        around each grid point.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device or backend; the message names the argument.

    Source: the consistency loss of CorrMatch (CVPR 2024, arXiv 2306.04300).
    """
    checks.feature_map("logits", logits, flat=False)
    checks.feature_map("target", target, logits, flat=False)
    if target.shape != logits.shape:
        raise ValueError(f"target: expected shape {tuple(logits.shape)} as logits, got {tuple(target.shape)}")
    if target.requires_grad:
        raise ValueError("target: no gradient flows to it; pass target.detach()")
    if weight is None:
        weight = _ones(logits, logits[:, 0].shape)
    _check_pixels("weight", weight, checks.FLOATING, logits)
    return _loss(logits, None, target, weight, choose("pixel_loss", backend, logits, target))


def _check_pixels(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], logits: Tensor) -> None:
    checks.tensor(name, x, dtypes, logits)
    if x.dim() != 3 or x.shape[0] != logits.shape[0] or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape ({logits.shape[0]}, H, W), got {tuple(x.shape)}")
    checks.pixels(name, x.shape[1], x.shape[2])
    if x.requires_grad:
        raise ValueError(f"{name}: no gradient flows to it; pass {name}.detach()")


def _ones(logits: Tensor, shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=accumulation_dtype(logits), device=logits.device)


def _loss(
    logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return call("pixel_loss", backend, logits, labels, target, weight)
    checks.backward_only(logits=logits)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    loss, pixels, _ = torch.ops.corrmatch.pixel_loss(logits, labels, target, weight, gradient, backend)
    return loss, pixels.detach()


def pixel_loss_op(
    logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor, gradient: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms and, if `gradient` is set, gradient (B, C, h, w) of the cross-entropy or of the divergence.

    All are in the accumulation dtype. The gradient stays in it, because a loss scaler may multiply the gradient later.
    """
    loss, pixels, grad = results = _empty_results(logits, weight, gradient)
    if pixels.numel() == 0:
        loss.zero_()
    else:
        call("pixel_loss", backend, logits, labels, target, weight, loss, pixels, grad if gradient else None)
    return results


@implementation("pixel_loss", "reference")
def _reference(logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Called outside of the registered op, so that autograd differentiates it."""
    if labels is None:
        return reference.divergence(logits, target, weight)  # type: ignore[arg-type]  # one of the two is there
    labels = torch.ops.corrmatch.checked_labels(labels, weight, logits.shape[1])
    return reference.cross_entropy(logits, labels, weight)


@implementation("pixel_loss", "cpu")
def _cpu(
    logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor, loss: Tensor, pixels: Tensor,
    grad: Tensor | None,
) -> None:  # fmt: skip
    run_on_cpu(
        _C.cpu.pixel_loss, borrow(logits), borrow(labels), borrow(target), borrow(weight), borrow(pixels), borrow(loss),
        borrow(grad),
    )  # fmt: skip


@implementation("pixel_loss", "triton", dtypes=HALF_AND_SINGLE, channels=256, capability=80)
def _triton(
    logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor, loss: Tensor, pixels: Tensor,
    grad: Tensor | None,
) -> None:  # fmt: skip
    if labels is not None:  # the operator for CPUs checks them
        checks.classes(labels, weight != 0, logits.shape[1], "where the weight is not 0")
    kernels("pixel_loss").loss(logits, labels, target, weight, loss, pixels, grad)


def checked_labels_op(labels: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Checks the range of the labels and returns them. A separate op, because a compiler cannot trace the check."""
    checks.classes(labels, weight != 0, num_classes, "where the weight is not 0")
    return labels.clone()


def _empty_results(logits: Tensor, weight: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits)
    return (
        torch.empty((), dtype=dtype, device=logits.device),
        torch.empty(weight.shape, dtype=dtype, device=logits.device),
        torch.empty(logits.shape if gradient else (0,), dtype=dtype, device=logits.device),
    )


def _fake(logits, labels, target, weight, gradient, backend):
    return _empty_results(logits, weight, gradient)


def pixel_loss_backward_op(grad_loss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The saved gradient times the gradient of the loss, in the dtype of the logits."""
    return (grad * grad_loss).to(dtype)


def _fake_backward(grad_loss, grad, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _save(ctx, inputs, output):
    logits, _, _, _, ctx.gradient, _ = inputs
    ctx.dtype = logits.dtype
    ctx.set_materialize_grads(False)  # without zeros for the two outputs that have no gradient
    ctx.save_for_backward(output[2])


def _backward(ctx, grad_loss, *_):
    if not ctx.gradient:
        raise RuntimeError(
            "logits: a gradient is asked for, but the op was called with gradient=False, as vmap calls it"
        )
    if grad_loss is None:
        return (None,) * 6
    return torch.ops.corrmatch.pixel_loss_backward(grad_loss, *ctx.saved_tensors, ctx.dtype), *[None] * 5


def _refuse(ctx, *grads):
    raise RuntimeError("pixel_loss has no second derivatives; backend='reference' has them")


register("checked_labels", checked_labels_op, fake=lambda labels, weight, num_classes: torch.empty_like(labels))
register("pixel_loss", pixel_loss_op, fake=_fake, save=_save, backward=_backward)
register("pixel_loss_backward", pixel_loss_backward_op, fake=_fake_backward, backward=_refuse)
