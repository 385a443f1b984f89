"""Region propagation: see `support`."""

from __future__ import annotations

import random

import torch
import wrong_arguments
from bounds import different
from contracts import lent
from layouts import wide
from random_inputs import FLOATING, INF, INTEGERS, NAN, RandomCall, flags, placed, side
from wrong_arguments import FLAGS, LABELS, MASKS

from corrmatch import RegionMasks, ops, reference

FUNCTIONS = ("region_propagate",)


def sample(size=(27, 39), device="cpu", **options):
    labels = torch.randint(5, (2, *size), device=device).to(torch.uint8)
    labels[:, : size[0] // 2] = 3
    reliable, valid = (torch.rand(2, *size, device=device) < 0.8 for _ in range(2))
    masks = RegionMasks.from_bool(torch.rand(2, 6, *size, device=device) < 0.3)

    def call(labels, reliable, packed, valid, threshold):
        masks = RegionMasks(packed, (labels.shape[1], labels.shape[2]))
        return ops.region_propagate(labels, reliable, masks, threshold, num_classes=5, valid=valid, **options)

    return call, [labels, reliable, masks.packed, valid, torch.tensor(0.45, device=device)]


SAMPLES = {"region_propagate": sample}
DIFFERENTIABLE = ()


def random_region_propagate(r: random.Random) -> RandomCall:
    batch, count, (height, width) = r.choice((0, 1, 1, 2, 3)), r.randint(0, 9), side(r)
    classes, dtype = r.choice((1, 2, 3, 19, 21, 127, 128, 255, 256, 1000, 65536)), r.choice(INTEGERS)
    classes = min(classes, torch.iinfo(dtype).max + 1)
    labels = torch.randint(min(classes, r.choice((1, 2, 3, classes))), (batch, height, width)).to(dtype)
    reliable, valid = flags(r, *labels.shape), flags(r, *labels.shape) if r.random() < 0.6 else None
    counted = reliable if valid is None else reliable & valid
    if r.random() < 0.5:  # what does not count may be anything
        labels[~counted] = r.choice((torch.iinfo(dtype).max, torch.iinfo(dtype).min))
    masks = torch.rand(batch, count, height, width) < r.choice((0.0, 0.2, 0.5, 0.9, 1.0))
    packed = RegionMasks.from_bool(masks).packed
    if r.random() < 0.3 and height * width % 32:  # bits behind the last pixel do not count
        packed[..., -1] |= -1 << height * width % 32
    threshold = r.choice((0.0, 0.2, 1 / 3, 0.5, 0.6, 2 / 3, 0.95, 1.0, -0.5, 1.5, 1e30))
    tensors = {
        "labels": placed(r, labels, repeats=False),
        "reliable": reliable,
        "masks": RegionMasks(placed(r, packed), (height, width)),
        "valid": valid,
    }
    if r.random() < 0.5:
        threshold = torch.tensor(r.choice((threshold, NAN, INF)), dtype=r.choice(FLOATING))
    options = {"threshold": threshold, "num_classes": classes}
    return RandomCall("region_propagate", disagreement, tensors, options)


def disagreement(random_call, target, found):
    expected = reference.region_propagate(**random_call.tensors, **random_call.options)
    return different("labels", found[0], expected[0]) or different("reliable", found[1], expected[1])


RANDOM = {random_region_propagate: 3}


def contract(labels, reliable, packed, threshold, valid, num_classes, out_labels, out_reliable, threads):
    shape = tuple(labels.shape)
    lent(labels, INTEGERS, *shape)
    assert len(shape) == 3
    lent(reliable, (torch.bool,), *shape)
    if valid is not None:
        lent(valid, (torch.bool,), *shape)
    lent(packed, (torch.int32,), shape[0], packed.shape[1], -(-shape[1] * shape[2] // 32))
    lent(threshold, (torch.float64,))
    assert 1 <= num_classes <= 65536
    lent(out_labels, (labels.dtype,), *shape, contiguous=True)
    lent(out_reliable, (torch.bool,), *shape, contiguous=True)


CONTRACT = {"region_propagate": contract}


def call(labels=LABELS, reliable=FLAGS, masks=MASKS, threshold=0.5, num_classes=4, **options):
    return ops.region_propagate(labels, reliable, masks, threshold, num_classes=num_classes, **options)


DTYPES = wrong_arguments.INTEGERS
PACKED = "masks.packed: expected shape (2, K, 1)"
VALID = (call,)
WRONG = [
    *wrong_arguments.threshold(call),
    (call, {"threshold": None}, TypeError, "threshold: expected a number, got NoneType"),
    (call, {"labels": LABELS.float()}, TypeError, f"labels: expected dtype {DTYPES}, got float32"),
    (call, {"labels": FLAGS}, TypeError, f"labels: expected dtype {DTYPES}, got bool"),
    (call, {"labels": LABELS[0]}, ValueError, "labels: expected shape (B, H, W), got (5, 6)"),
    (call, {"labels": LABELS + 3, "reliable": FLAGS | True}, ValueError, "labels: "),
    (call, {"labels": LABELS - 3, "reliable": FLAGS | True}, ValueError, "labels: "),
    (call, {"reliable": FLAGS.float()}, TypeError, "reliable: expected dtype bool, got float32"),
    (call, {"reliable": FLAGS.to(torch.uint8)}, TypeError, "reliable: expected dtype bool, got uint8"),
    (call, {"reliable": FLAGS[:, :4]}, ValueError, "reliable: expected shape (2, 5, 6), got (2, 4, 6)"),
    (call, {"valid": LABELS}, TypeError, "valid: expected dtype bool, got int64"),
    (call, {"valid": FLAGS[:1]}, ValueError, "valid: expected shape (2, 5, 6), got (1, 5, 6)"),
    (call, {"masks": MASKS.packed}, TypeError, "masks: expected RegionMasks, got Tensor"),
    (call, {"masks": RegionMasks(MASKS.packed, (6, 5))}, ValueError, "masks: expected masks of (5, 6) pixels"),
    (call, {"masks": RegionMasks(MASKS.packed.long(), (5, 6))}, TypeError, "masks.packed: expected dtype int32"),
    (call, {"masks": RegionMasks(MASKS.packed[:1], (5, 6))}, ValueError, PACKED),
    (call, {"masks": RegionMasks(MASKS.packed[..., :0], (5, 6))}, ValueError, PACKED),
    (call, {"masks": RegionMasks(MASKS.packed[:, 0], (5, 6))}, ValueError, PACKED),
    (call, {"num_classes": 0}, ValueError, "num_classes: expected 1 to 65536, got 0"),
    (call, {"num_classes": 65537}, ValueError, "num_classes: expected 1 to 65536, got 65537"),
    (call, {"num_classes": 4.0}, TypeError, "num_classes: expected an integer, got float"),
    (call, {"num_classes": True}, TypeError, "num_classes: expected an integer, got bool"),
    *wrong_arguments.backend(call),
]
DENSE = [
    (call, {}, "labels", LABELS),
    (call, {}, "reliable", FLAGS),
    (call, {}, "valid", FLAGS),
    (call, {}, "threshold", torch.tensor(0.5)),
]
SIZE = (1, 2**16, 2**15)
TOO_LARGE = {
    "labels": lambda: ops.region_propagate(
        wide(*SIZE, dtype=torch.uint8), wide(*SIZE, dtype=torch.bool), None, 0.5, num_classes=3
    ),
}


def opcheck_others():
    return iter(())


def opcheck_calls():
    labels, reliable, valid = torch.randint(4, (2, 9, 7)), torch.rand(2, 9, 7) < 0.7, torch.rand(2, 9, 7) < 0.7
    packed, threshold = RegionMasks.from_bool(torch.rand(2, 5, 9, 7) < 0.5).packed, torch.tensor(0.4).double()
    propagate = torch.ops.corrmatch.region_propagate.default
    yield propagate, (labels, reliable, packed, threshold, valid, 4)
    yield propagate, (labels.to(torch.uint8), reliable, packed, threshold, None, 4)
    yield propagate, (labels.mT.contiguous().mT, reliable, packed, threshold, None, 4)
