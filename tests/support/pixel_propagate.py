"""Pixel propagation: see `support`."""

from __future__ import annotations

import random

import torch
import wrong_arguments
from backends import FLOATING
from bounds import RowsOfP, beyond, unbounded
from contracts import lent
from random_inputs import RandomCall, features, maps, numbers, placed, scale
from torch import Tensor
from wrong_arguments import FLAGS, META, K, Q, V

from corrmatch import ops, reference
from corrmatch.dtypes import accumulation, confidence_gate
from corrmatch.kernels import gate, packing, pixel_propagate_backward
from corrmatch.kernels import pixel_propagate as kernels

FUNCTIONS = ("pixel_propagate",)


def sample(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, size[1], size[0], device), maps(2, 4, *size, device)]
    return lambda q, k, v: ops.pixel_propagate(q, k, v, **options), arguments


def thresholded(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device), maps(2, 4, *size, device)]
    return lambda q, k, v: ops.pixel_propagate(q, k, v, threshold=0.5, normalize=True, **options), arguments


def gated(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device), maps(2, 4, *size, device)]
    arguments += [torch.rand(2, *size, device=device), torch.tensor(0.4, device=device)]

    def call(q, k, v, confidence, threshold):
        return ops.pixel_propagate(q, k, v, confidence=confidence, threshold=threshold, **options)

    return call, arguments


SAMPLES = {"pixel_propagate": sample, "pixel_propagate_thresholded": thresholded, "pixel_propagate_gated": gated}
DIFFERENTIABLE = tuple(SAMPLES)


def random_pixel_propagate(r: random.Random) -> RandomCall:
    (query, key, value), shapes = features(r, flat=r.random() < 0.2, count=3)
    options = {"scale": scale(r), "normalize": r.random() < 0.4}
    tensors = {"query": query, "key": key, "value": value}
    confidence = None
    if r.random() < 0.3:
        confidence = tensors["confidence"] = placed(r, numbers(r, r.choice(FLOATING), query.shape[0], *shapes[0]))
    if confidence is not None or r.random() < 0.3:
        seen = accumulation(value)[0].double().softmax(1).amax(1) if confidence is None else confidence
        options["threshold"] = between(r, seen)
        if r.random() < 0.5:
            options["threshold"] = torch.tensor(options["threshold"], dtype=torch.float64)
    grad = numbers(r, value.dtype, *value.shape[:2], *shapes[1])
    return RandomCall(
        "pixel_propagate", disagreement, tensors, options, grad=placed(r, grad), leaves=("query", "key", "value")
    )


def between(r: random.Random, values: Tensor) -> float:
    """A number with a distance from all values, so that rounding does not decide their comparison."""
    known = values.double().flatten()
    known = known[known.abs() < 1e30].sort().values
    if known.numel() == 0:
        return 0.5
    edges = torch.cat([known[:1] - known[:1].abs() - 1, known, known[-1:] + known[-1:].abs() + 1])
    gaps = edges.diff()
    wide = (gaps > 1e-3 * (1 + edges[1:].abs())).nonzero().flatten().tolist()
    at = r.choice(wide)  # the first and the last are wide: all open, all closed
    return float(edges[at] + gaps[at] / 2)


def disagreement(random_call, target, found):
    t, options = random_call.tensors, random_call.options
    maps = {k: t[k].double().detach().requires_grad_() for k in ("query", "key", "value")}
    wide = {**t, **maps}
    if "confidence" in t:
        wide["confidence"] = t["confidence"].double()
    expected = reference.pixel_propagate(**wide, **options)
    grad = random_call.grad.double()
    gradients = torch.autograd.grad(expected, list(maps.values()), grad, retain_graph=False)

    value, positions = t["value"], t["query"].flatten(2).shape[2]
    common = torch.promote_types(torch.promote_types(t["query"].dtype, t["key"].dtype), value.dtype)
    rounding = torch.finfo(common).eps if target.name == "triton" and common.itemsize == 2 else 0.0
    rows = RowsOfP(t["query"], t["key"], options["scale"], value.dtype, rounding=rounding)
    gate = torch.ones(value.shape[0], positions, dtype=torch.bool)
    if "threshold" in options:
        gate = confidence_gate(maps["value"].detach(), wide.get("confidence"), options["threshold"])

    info, narrow = torch.finfo(rows.dtype), torch.finfo(value.dtype)
    opened = gate.unsqueeze(2)
    p, error = torch.where(opened, rows.p, 0), torch.where(opened, rows.error, 0)
    v = torch.where(gate.unsqueeze(1), value.double().flatten(2).abs(), 0)
    sums = v @ p
    summing = (positions + 4) * info.eps + rounding
    wild = unbounded(*(t[name] for name in ("query", "key", "value"))).view(-1, 1, 1)
    bound = v @ error + summing * sums + (1 + v.amax(2, keepdim=True)) * positions * 4 * info.smallest_normal
    z = expected.detach().flatten(2)
    if options["normalize"]:
        mass = p.sum(1, keepdim=True)
        mass_error = error.sum(1, keepdim=True) + summing * mass + positions * info.smallest_normal
        least = mass - mass_error
        bound = torch.where(least > 0.5 * mass, (bound + z.abs() * mass_error) / least, float("inf"))
        bound[(~gate).all(1)] = 0
        wild = wild & ~(mass <= mass_error)  # what arrives may be nothing
    bound += narrow.eps * z.abs() + narrow.smallest_normal
    within = (sums.maximum(z.abs()) + bound) < min(info.max, narrow.max) / 2
    bound = torch.where(within, bound, float("inf"))
    wrong = beyond("result", found[0].flatten(2), z, bound, wild)
    return wrong or check_gradients(random_call, rows, gate, rounding, found[1:], gradients)


def check_gradients(random_call, rows, gate, rounding, found, expected):
    """Compares gradients of images whose numbers and scores are well in range."""
    t = random_call.tensors
    inputs = (t["query"], t["key"], t["value"], random_call.grad)
    info, largest = torch.finfo(rows.dtype), min(torch.finfo(x.dtype).max for x in inputs) ** 0.5
    slack = torch.where(gate, rows.slack, 0).amax(1)
    opened = gate.unsqueeze(2)
    tight = torch.where(opened, rows.error, 0).isfinite().all((1, 2)) & (slack < 0.1)
    for x in inputs:
        tight &= (x.double().abs() < largest).flatten(1).all(1)
    p, mass = torch.where(opened, rows.p, 0), None
    if random_call.options["normalize"]:
        mass = p.sum(1, keepdim=True)
        tight &= (mass > 1e-3).all((1, 2))
    kept = tight.nonzero().flatten()
    count = sum(x.shape[1] * x.shape[2:].numel() for x in inputs)
    relative = torch.expm1(4 * slack[kept] + 8 * count * info.eps + 16 * rounding).view(-1, 1, 1)
    p = torch.where(opened[kept], p[kept].maximum(rows.lost / relative), 0)
    sizes = terms(p, None if mass is None else mass[kept], random_call.options["scale"], *(x[kept] for x in inputs))
    largest = torch.stack([x.double().flatten(1).abs().amax(1) for x in inputs[:2]]).amax(0)[kept].view(-1, 1, 1)
    scale = random_call.options["scale"]
    steepness = 1 + (1 if scale is None else abs(scale)) * largest
    for name, a, b, size in zip(("query", "key", "value"), found, expected, sizes, strict=True):
        a, b, narrow = a[kept].flatten(2), b[kept].flatten(2), torch.finfo(a.dtype)
        floor = narrow.smallest_normal + info.smallest_normal * count * steepness
        bound = relative * size + narrow.eps * b.abs() + floor
        bound = torch.where(size + bound < narrow.max / 4, bound, float("inf"))
        wrong = beyond(f"gradient of {name}", a, b, bound)
        if wrong:
            return wrong
    return None


def terms(p, mass, scale, query, key, value, grad):
    """The sums of the absolute terms of the gradients of query, key and value, to which errors are proportional."""
    q, k, v, g = (x.double().flatten(2).abs() for x in (query, key, value, grad))
    shares = v.mT @ g  # <V_i, G_j>
    if mass is not None:
        g = g / mass
        shares = v.mT @ g + ((v @ p / mass) * g).sum(1, keepdim=True)
    scores = abs(query.shape[1] ** -0.5 if scale is None else scale) * p
    scores = scores * (shares + (p * shares).sum(2, keepdim=True))
    return k @ scores.mT, q @ scores, g @ p.mT


RANDOM = {random_pixel_propagate: 8}


def contract(query, key, value, gate, threshold, scale, out, normalizer, threads):
    batch, depth, height, width = query.shape
    lent(query, FLOATING, batch, depth, height, width)
    lent(key, FLOATING, batch, depth, *key.shape[2:4])
    lent(value, FLOATING, batch, value.shape[1], height, width)
    if gate is not None:
        lent(gate, (torch.bool,), batch, 1, height, width)
    if threshold is not None:
        lent(threshold, (torch.float64,))
    mass = out.shape[1] - value.shape[1]
    assert mass in (0, 1)
    lent(out, FLOATING, batch, value.shape[1] + mass, *key.shape[2:4], contiguous=True)
    wide = torch.float64 in (query.dtype, key.dtype, value.dtype)
    dtype = (torch.float64 if wide else torch.float32,)
    lent(normalizer, dtype, batch, 2, height * width, contiguous=True)
    assert min(query.numel(), key.numel(), value.numel()) > 0


CONTRACT = {"pixel_propagate_forward": contract}


def call(query=Q, key=K, value=V, **options):
    return ops.pixel_propagate(query, key, value, **options)


GATED = {"confidence": torch.rand(2, 4, 5), "threshold": 0.5}
VALID = (call,)
WRONG = [
    *wrong_arguments.query_key(call),
    (call, {"value": V.int()}, TypeError, "value: expected dtype"),
    (call, {"value": V[:1]}, ValueError, "value: expected a batch of 2"),
    (call, {"value": V[..., :4]}, ValueError, "value: expected positions (4, 5) as in query, got (4, 4)"),
    (call, {"value": V.mT}, ValueError, "value: expected positions (4, 5) as in query, got (5, 4)"),
    (call, {"value": V.flatten(2)}, ValueError, "value: expected positions (4, 5) as in query, got (20,)"),
    (call, {"value": V[:, :0]}, ValueError, "value: expected at least one"),
    (call, {"confidence": torch.rand(2, 4, 5)}, ValueError, "threshold: expected one along with confidence, got None"),
    (call, {"confidence": torch.rand(2, 5, 4), "threshold": 0.5}, ValueError, "confidence: expected shape (2, 4, 5)"),
    (call, {"confidence": torch.rand(4, 5), "threshold": 0.5}, ValueError, "confidence: expected shape (2, 4, 5)"),
    (call, {"confidence": FLAGS, "threshold": 0.5}, TypeError, "confidence: expected dtype"),
    (call, {"confidence": 0.5, "threshold": 0.5}, TypeError, "confidence: expected a tensor, got float"),
    *wrong_arguments.threshold(call),
    (call, {"normalize": 1}, TypeError, "normalize: expected a bool, got int"),
    (call, {"normalize": torch.ones(2)}, TypeError, "normalize: expected a bool, got Tensor"),
    (call, {"threshold": META[0, 0, 0, 0]}, ValueError, "threshold: expected a tensor on cpu as the others, got meta"),
    *wrong_arguments.backend(call),
]
DENSE = [
    (call, {}, "query", Q),
    (call, {}, "key", K),
    (call, {}, "value", V),
    (call, GATED, "confidence", GATED["confidence"]),
    (call, {}, "threshold", torch.tensor(0.5)),
]
TOO_LARGE = {}


def opcheck_others():
    return iter(())


def opcheck_calls():
    maps = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4, 5), (2, 3, 3, 2), (2, 4, 4, 5))]
    wide = [x.detach().double().requires_grad_() for x in maps]
    mixed = [maps[0].detach().half(), maps[1], maps[2].detach().double()]
    gate, threshold = torch.rand(2, 1, 4, 5) < 0.5, torch.tensor(0.4, dtype=torch.float64)
    strided = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in maps]
    propagate = torch.ops.corrmatch.pixel_propagate.default
    for tensors in (maps, wide, mixed, strided):
        yield propagate, (*tensors, None, None, 0.5, False, True)
    yield propagate, (*maps, gate, None, 0.5, True, True)
    yield propagate, (*maps, None, threshold, 0.5, False, True)
    yield propagate, (*(x.detach()[:0] for x in maps), None, None, 0.5, False, False)

    saved = [x.detach() for x in torch.ops.corrmatch.pixel_propagate(*maps, None, None, 0.5, False, True, "cpu")[1:]]
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        plain, grad = [x.detach() for x in maps], torch.randn(2, 4, 3, 2)
        yield torch.ops.corrmatch.pixel_propagate_backward.default, (grad, *plain, *saved, 0.5, needs)


LINEAR = {"pack", "pack gradient", "gate", "open rows"}
LAUNCHES = {
    packing: ("pack_kernel", "pack_gradient_kernel"),
    gate: ("confidence_gate_kernel", "open_rows_kernel"),
    kernels: ("row_kernel", "column_kernel"),
    pixel_propagate_backward: ("backward_row_kernel", "backward_column_kernel"),
}


def large_batch(maps):
    ops.pixel_propagate(*maps, threshold=0.5, backend="triton").sum().backward()
