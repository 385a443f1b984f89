"""Connected components: see `support`."""

from __future__ import annotations

import random

import torch
import wrong_arguments
from bounds import different
from contracts import lent
from layouts import wide
from random_inputs import INTEGERS, RandomCall, placed
from wrong_arguments import FLAGS, LABELS

from corrmatch import ops, reference

FUNCTIONS = ("connected_components",)


def sample(size=(40, 70), device="cpu", **options):
    image = torch.randint(3, (2, *size), device=device)
    return lambda image: ops.connected_components(image, **options), [image]


SAMPLES = {"connected_components": sample}
DIFFERENTIABLE = ()


def random_connected_components(r: random.Random) -> RandomCall:
    lead = r.choice(((), (1,), (2,), (2, 3), (0,)))
    dtype = r.choice((torch.bool, *INTEGERS))
    image = torch.randint(r.choice((1, 2, 2, 3, 5)), (*lead, r.randint(0, 40), r.randint(0, 140)))
    background = r.choice((0, 0, 1, -1, 300, 2**63 - 1))
    if dtype not in (torch.bool, torch.uint8) and r.random() < 0.3:
        image -= 2
    tensors = {"image": placed(r, image.to(dtype))}
    options = {"connectivity": r.choice((4, 8)), "background": background}
    return RandomCall("connected_components", disagreement, tensors, options)


def disagreement(random_call, target, found):
    return different("numbers", found, reference.connected_components(**random_call.tensors, **random_call.options))


RANDOM = {random_connected_components: 3}


def contract(image, connectivity, background, out, threads):
    lent(image, (torch.bool, *INTEGERS), *image.shape)
    assert image.dim() == 3
    assert connectivity in (4, 8)
    lent(out, (torch.int32,), *image.shape, contiguous=True)


CONTRACT = {"connected_components": contract}


def call(image=LABELS, **options):
    return ops.connected_components(image, **options)


DTYPES = wrong_arguments.INTEGERS
VALID = (call,)
WRONG = [
    (call, {"image": LABELS.float()}, TypeError, f"image: expected dtype bool, {DTYPES}, got float32"),
    (call, {"image": LABELS[0, 0]}, ValueError, "image: expected shape (..., H, W), got (6,)"),
    (call, {"image": [[1]]}, TypeError, "image: expected a tensor, got list"),
    (call, {"background": 0.0}, TypeError, "background: expected an integer, got float"),
    (call, {"background": 2**63}, ValueError, "background: expected"),
    *wrong_arguments.connectivity(call),
    *wrong_arguments.backend(call),
]
DENSE = [(call, {}, "image", LABELS), (call, {}, "image", FLAGS)]
TOO_LARGE = {"image": lambda: ops.connected_components(wide(2**16, 2**15, dtype=torch.uint8))}


def opcheck_others():
    return iter(())


def opcheck_calls():
    labels = torch.randint(4, (2, 9, 7))
    for image in (labels, labels[0], labels.bool(), labels.mT):
        yield torch.ops.corrmatch.connected_components.default, (image, 8, 0)
