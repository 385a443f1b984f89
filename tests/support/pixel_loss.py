"""Losses at every pixel: see `support`. Two functions share one op."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
import wrong_arguments
from bounds import beyond
from contracts import FLOATING, lent
from random_inputs import INTEGERS, RandomCall, channels, maps, numbers, placed, side
from wrong_arguments import FLAGS, FLOATS, LABELS, LOGITS, META

from corrmatch import ops, reference
from corrmatch.dtypes import accumulation_dtype
from corrmatch.kernels import pixel_loss as kernels

FUNCTIONS = ("cross_entropy", "divergence")


def cross_entropy(size=(7, 9), device="cpu", **options):
    height, width = 4 * size[0] - 2, 4 * size[1]
    labels = torch.randint(6, (2, height, width), device=device)
    arguments = [3 * maps(2, 6, *size, device), labels, torch.rand(2, height, width, device=device) / (height * width)]
    return lambda logits, labels, weight: ops.cross_entropy(logits, labels, weight, **options)[0], arguments


def divergence(size=(7, 9), device="cpu", **options):
    height, width = 4 * size[0] - 2, 4 * size[1]
    arguments = [3 * maps(2, 6, *size, device), torch.rand(2, height, width, device=device) / (height * width)]
    return lambda logits, weight: ops.divergence(logits, logits.detach().flip(1), weight, **options)[0], arguments


SAMPLES = {"cross_entropy": cross_entropy, "divergence": divergence}
DIFFERENTIABLE = tuple(SAMPLES)


def random_inputs(r: random.Random) -> tuple[dict[str, Any], int, torch.dtype]:
    batch, (height, width), dtype = r.choice((0, 1, 1, 2, 3)), side(r), r.choice(FLOATING)
    logits = numbers(r, dtype, batch, channels(r), height, width)
    sizes = ((height, width), (r.randint(1, 40), r.randint(1, 40)), (3 * height - 2, 4 * width - 3))
    shape = (batch, *r.choice(sizes))
    weight = torch.rand(shape) * (torch.rand(shape) < r.choice((0.0, 0.5, 1.0))) * r.choice((1, 1e-6))
    return {"logits": placed(r, logits), "weight": placed(r, weight.to(r.choice(FLOATING)))}, logits.shape[1], dtype


def random_cross_entropy(r: random.Random) -> RandomCall:
    tensors, classes, _ = random_inputs(r)
    dtype = r.choice([x for x in INTEGERS if classes <= torch.iinfo(x).max])
    labels = torch.randint(classes, tensors["weight"].shape).to(dtype)
    if r.random() < 0.5:  # what does not count may be anything
        labels[tensors["weight"] == 0] = r.choice((torch.iinfo(dtype).max, torch.iinfo(dtype).min))
    tensors["labels"] = placed(r, labels, repeats=False)
    return RandomCall("cross_entropy", disagreement, tensors)


def random_divergence(r: random.Random) -> RandomCall:
    tensors, _, dtype = random_inputs(r)
    target = numbers(r, dtype, *tensors["logits"].shape)
    return RandomCall("divergence", disagreement, {**tensors, "target": placed(r, target)})


def disagreement(random_call, target, found):
    """Compares the terms of pixels whose logits are well in range. The loss is their sum."""
    t = random_call.tensors
    weight, maps = t["weight"].double(), [t[name] for name in ("logits", "target") if name in t]
    wide = {k: x.double() if x.is_floating_point() else x for k, x in t.items()}
    _, expected = getattr(reference, random_call.name)(**wide)
    info = torch.finfo(accumulation_dtype(*maps))
    largest, bad, size = torch.zeros_like(weight), torch.zeros_like(weight), weight.shape[1:]
    for x in maps:
        wild = (~x.isfinite()).any(1, keepdim=True).double()
        most = x.double().abs().amax(1, keepdim=True).nan_to_num(0, 0, 0)
        if size != x.shape[2:]:
            wild = F.max_pool2d(wild, 3, 1, 1)  # a neighbour of weight 0 may be looked at
            wild, most = (F.interpolate(y, size=size, mode="bilinear", align_corners=True) for y in (wild, most))
        bad, largest = bad + wild.squeeze(1), torch.maximum(largest, most.squeeze(1))
    units = 16 + 2 * max(maps[0].shape[2:])  # F.interpolate rounds the position
    error = units * info.eps * largest
    strict = (weight == 0) | ((bad == 0) & (largest < info.max / 8) & (error < 0.1))
    rounding = (maps[0].shape[1] + 16) * info.eps * (1 + 4 * largest)
    bound = weight * (4 * error * (1 + 4 * largest) + rounding) + 4 * info.eps * expected.abs() + info.smallest_normal
    pixels, total = found[1].cpu().double(), found[0].detach().cpu().double()
    wrong = beyond("pixels", pixels, torch.where(strict, expected, 0), torch.where(strict, bound, float("inf")))
    if wrong or not pixels.abs().sum() < info.max / 2:  # their sum is beyond the range, or no number
        return wrong
    return beyond("loss", total, pixels.sum(), pixels.numel() * info.eps * pixels.abs().sum() + info.smallest_normal)


RANDOM = {random_cross_entropy: 3, random_divergence: 2}


def contract(logits, labels, target, weight, pixels, loss, grad, threads):
    batch, classes = logits.shape[:2]
    lent(logits, FLOATING, batch, classes, *logits.shape[2:4])
    lent(weight, FLOATING, batch, *weight.shape[1:3])
    assert (labels is None) != (target is None)
    if labels is not None:
        lent(labels, INTEGERS, *weight.shape)
    else:
        lent(target, FLOATING, *logits.shape)
    dtype = (torch.float64 if logits.dtype == torch.float64 else torch.float32,)
    lent(pixels, dtype, *weight.shape, contiguous=True)
    lent(loss, dtype)
    if grad is not None:
        lent(grad, dtype, *logits.shape, contiguous=True)
    assert min(logits.numel(), weight.numel()) > 0


CONTRACT = {"pixel_loss": contract}


def entropy(logits=LOGITS, labels=LABELS % 3, **options):
    return ops.cross_entropy(logits, labels, **options)


def distance(logits=LOGITS, target=LOGITS + 1, **options):
    return ops.divergence(logits, target, **options)


def logits_and_weight(call):
    return [
        (call, {"logits": LABELS}, TypeError, "logits: expected dtype"),
        (call, {"logits": LOGITS.flatten(2)}, ValueError, "logits: expected shape (B, channels, H, W)"),
        (call, {"logits": LOGITS[:, :0]}, ValueError, "logits: expected at least one channel"),
        (call, {"weight": FLAGS}, TypeError, f"weight: expected dtype {FLOATS}, got bool"),
        (call, {"weight": 0.5}, TypeError, "weight: expected a tensor, got float"),
        (call, {"weight": torch.rand(1, 5, 6)}, ValueError, "weight: expected shape (2, H, W), got (1, 5, 6)"),
        (call, {"weight": torch.rand(2, 5)}, ValueError, "weight: expected shape (2, H, W), got (2, 5)"),
        (call, {"weight": torch.rand(2, 0, 6)}, ValueError, "weight: expected shape (2, H, W), got (2, 0, 6)"),
        (
            call,
            {"weight": torch.rand(2, 5, 6).requires_grad_()},
            ValueError,
            "weight: no gradient flows to it; pass weight.detach()",
        ),
        (call, {"weight": META[:, 0]}, ValueError, "weight: expected a tensor on cpu as the others, got meta"),
    ]


DTYPES = wrong_arguments.INTEGERS
VALID = (entropy, distance)
WRONG = [
    *logits_and_weight(entropy),
    *logits_and_weight(distance),
    (entropy, {"weight": torch.rand(2, 6, 5)}, ValueError, "weight: expected shape (2, 5, 6) as labels, got (2, 6, 5)"),
    (entropy, {"labels": LABELS.float()}, TypeError, f"labels: expected dtype {DTYPES}, got float32"),
    (entropy, {"labels": FLAGS}, TypeError, f"labels: expected dtype {DTYPES}, got bool"),
    (entropy, {"labels": LABELS[:1]}, ValueError, "labels: expected shape (2, H, W), got (1, 5, 6)"),
    (entropy, {"labels": LABELS[0]}, ValueError, "labels: expected shape (2, H, W), got (5, 6)"),
    (entropy, {"labels": LABELS + 3}, ValueError, "labels: expected values in [0, 2] where the weight is not 0, got "),
    (distance, {"target": LOGITS[..., :4]}, ValueError, "target: expected shape (2, 3, 4, 5) as logits"),
    (distance, {"target": LOGITS[:1]}, ValueError, "target: expected a batch of 2 as the others, got 1"),
    (distance, {"target": LABELS}, TypeError, "target: expected dtype"),
    (
        distance,
        {"target": LOGITS.clone().requires_grad_()},
        ValueError,
        "target: no gradient flows to it; pass target.detach()",
    ),
    *wrong_arguments.backend(entropy),
    *wrong_arguments.backend(distance),
]
PIXELS = torch.rand(2, 5, 6)
DENSE = [
    (entropy, {}, "logits", LOGITS),
    (entropy, {}, "labels", LABELS % 3),
    (entropy, {}, "weight", PIXELS),
    (distance, {}, "logits", LOGITS),
    (distance, {}, "target", LOGITS),
    (distance, {}, "weight", PIXELS),
]
TOO_LARGE = {}


def opcheck_calls():
    loss, target = torch.ops.corrmatch.pixel_loss.default, torch.randn(2, 5, 4, 6)
    wanted = torch.randn(2, 5, 4, 6, requires_grad=True)
    classes, weight = torch.randint(5, (2, 9, 7)), torch.rand(2, 9, 7)
    yield loss, (wanted, classes, None, weight, True)
    yield loss, (wanted, None, target, weight, True)
    yield loss, (target.half(), classes.to(torch.uint8), None, weight.half(), False)


def opcheck_others():
    gradient = (torch.tensor(0.3), torch.randn(2, 3, 4, 5), torch.float16)
    yield torch.ops.corrmatch.pixel_loss_backward.default, gradient
    yield torch.ops.corrmatch.checked_labels.default, (torch.randint(4, (2, 5, 6)), torch.rand(2, 5, 6), 4)


LINEAR = {"cross-entropy", "divergence"}
LAUNCHES = {kernels: ("loss_kernel",)}


def large_batch(maps):
    labels = torch.zeros(1, 5, 5, dtype=torch.uint8).expand(len(maps[0]), 5, 5)
    ops.cross_entropy(maps[0], labels, backend="triton")
