"""Pseudo-labels: see `support`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
import wrong_arguments
from bounds import beyond, different
from contracts import FLOATING, lent
from layouts import wide as of_any_size
from random_inputs import RandomCall, channels, flags, maps, numbers, placed, side
from wrong_arguments import FLAGS, LABELS, LOGITS

from corrmatch import ops
from corrmatch.dtypes import accumulation_dtype
from corrmatch.kernels import pseudo_label as kernels

FUNCTIONS = ("pseudo_label",)


def sample(size=(7, 9), device="cpu", **options):
    arguments = [3 * maps(2, 6, *size, device), torch.rand(2, 4 * size[0], 4 * size[1], device=device) < 0.2]

    def call(logits, ignore):
        return ops.pseudo_label(logits, size=(ignore.shape[1], ignore.shape[2]), ignore=ignore, **options)

    return call, arguments


SAMPLES = {"pseudo_label": sample}
DIFFERENTIABLE = ()


def random_pseudo_label(r: random.Random) -> RandomCall:
    batch, (height, width) = r.choice((0, 1, 1, 2, 3)), side(r)
    logits = numbers(r, r.choice(FLOATING), batch, channels(r), height, width)
    size = r.choice((None, (r.randint(1, 40), r.randint(1, 40)), (3 * height - 2, 4 * width - 3)))
    tensors = {"logits": placed(r, logits)}
    if r.random() < 0.6:
        tensors["ignore"] = flags(r, batch, *(size or (height, width)))
    return RandomCall("pseudo_label", disagreement, tensors, {"size": size})


def disagreement(random_call, target, found):
    logits, ignore, size = random_call.tensors["logits"], random_call.tensors.get("ignore"), random_call.options["size"]
    labels, confidence, peak = (x.cpu() for x in found)
    info = torch.finfo(accumulation_dtype(logits))
    wide = logits.double()
    largest = wide.abs().amax(1, keepdim=True)
    bad = (~wide.isfinite()).any(1, keepdim=True).double()
    if size is not None:
        bad = F.max_pool2d(bad, 3, 1, 1)  # a neighbour of weight 0 may be looked at
        wide, largest, bad = (
            F.interpolate(x, size=size, mode="bilinear", align_corners=True) for x in (wide, largest, bad)
        )
    strict = ((bad == 0) & (largest < info.max / 8)).squeeze(1)
    if ((labels < 0) | (labels >= logits.shape[1])).any():
        return "a label is out of range"
    units = 16 if size is None else 16 + 2 * max(logits.shape[2:])  # F.interpolate rounds the position
    error = units * info.eps * largest.squeeze(1) + 4 * info.smallest_normal
    best = wide.amax(1)
    chosen = wide.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = (strict & ~(chosen >= best - 2 * error)).nonzero()
    if len(wrong):
        return f"label at {wrong[0].tolist()} is not the largest"
    exact = wide.softmax(1).amax(1)
    bound = exact * torch.expm1(4 * error) + (logits.shape[1] + 8) * info.eps + torch.finfo(torch.float32).eps
    bound = torch.where(strict, bound, float("inf"))
    if size is None:  # numbers stay where they are, so what is not one shows
        wrong = (exact.isnan() != confidence.isnan()).nonzero()
        if len(wrong):
            return (
                f"confidence at {wrong[0].tolist()} is {confidence[tuple(wrong[0])]}, expected {exact[tuple(wrong[0])]}"
            )
    wrong = beyond("confidence", confidence, torch.where(strict, exact, 0), bound, ~strict)
    counted = confidence if ignore is None else torch.where(ignore, 0, confidence)
    of_class = torch.zeros(logits.shape[1]).scatter_reduce(0, labels.flatten(), counted.flatten(), "amax")
    return wrong or different("class_peak", torch.nan_to_num(peak, 2.0), torch.nan_to_num(of_class, 2.0))


RANDOM = {random_pseudo_label: 4}


def contract(logits, ignore, labels, confidence, class_peak, threads):
    lent(logits, FLOATING, *logits.shape)
    assert logits.dim() == 4
    shape = (logits.shape[0], *labels.shape[1:])
    if ignore is not None:
        lent(ignore, (torch.bool,), *shape)
    lent(labels, (torch.int64,), *shape, contiguous=True)
    assert len(shape) == 3
    lent(confidence, (torch.float32,), *shape, contiguous=True)
    lent(class_peak, (torch.float32,), logits.shape[1], contiguous=True)


CONTRACT = {"pseudo_label": contract}


def call(logits=LOGITS, **options):
    return ops.pseudo_label(logits, **options)


VALID = (call,)
WRONG = [
    *wrong_arguments.size(call),
    (call, {"logits": LABELS}, TypeError, "logits: expected dtype"),
    (call, {"logits": LOGITS[0]}, ValueError, "logits: expected shape (B, channels, H, W), got (3, 4, 5)"),
    (call, {"logits": LOGITS[:, :0]}, ValueError, "logits: expected at least one channel"),
    (call, {"ignore": torch.zeros(2, 4, 5)}, TypeError, "ignore: expected dtype bool, got float32"),
    (call, {"ignore": FLAGS}, ValueError, "ignore: expected shape (2, 4, 5), got (2, 5, 6)"),
    (call, {"ignore": FLAGS, "size": (6, 5)}, ValueError, "ignore: expected shape (2, 6, 5), got (2, 5, 6)"),
    *wrong_arguments.backend(call),
]
DENSE = [(call, {}, "logits", LOGITS), (call, {"size": (5, 6)}, "ignore", FLAGS)]
TOO_LARGE = {
    "logits": lambda: ops.pseudo_label(of_any_size(1, 2, 2**16, 2**15)),
    "size": lambda: ops.pseudo_label(of_any_size(1, 2, 3, 3), size=(2**16, 2**15)),
}


def opcheck_others():
    return iter(())


def opcheck_calls():
    logits = torch.randn(2, 5, 4, 6)
    yield torch.ops.corrmatch.pseudo_label.default, (logits, None, 4, 6)
    yield torch.ops.corrmatch.pseudo_label.default, (logits.half(), torch.rand(2, 9, 7) < 0.3, 9, 7)


LINEAR = {"label"}
LAUNCHES = {kernels: ("label_kernel",)}


def large_batch(maps):
    ops.pseudo_label(maps[0].detach(), backend="triton")
