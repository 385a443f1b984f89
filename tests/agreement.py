"""Whether a result agrees with the oracle, for any numbers: `disagreement` says where it does not.

The oracle is `corrmatch.reference` in float64. How far a result may be from it is derived from the arithmetic: a score
is off by so many units in the last place of what is added up for it, so P by a factor, so its sums. Where numbers may
leave the range of the dtype, or rounding alone decides, anything goes but a crash; where the oracle is not finite, the
result must not be either.
"""

from __future__ import annotations

from typing import Any

import layouts
import torch
import torch.nn.functional as F
from backends import Case
from problems import Problem
from torch import Tensor

from corrmatch import RegionMasks, ops, reference
from corrmatch.dtypes import accumulation_dtype, confidence_gate


def call(problem: Problem, case: Case) -> Any:
    """What the backend makes of it; with gradients, a tuple of the result and them."""
    tensors = {k: there(x, case.device) for k, x in problem.tensors.items()}
    options = dict(problem.options) if case.name == "torch" else {**problem.options, "backend": case.name}
    if isinstance(options.get("threshold"), Tensor):
        options["threshold"] = options["threshold"].to(case.device)
    if problem.op != "pixel_propagate":
        return getattr(ops, problem.op)(**tensors, **options)
    leaves = {k: tensors[k].detach().requires_grad_() for k in ("query", "key", "value")}
    z = ops.pixel_propagate(**{**tensors, **leaves}, **options)
    return z.detach(), *torch.autograd.grad(z, list(leaves.values()), layouts.moved(problem.grad, case.device))


def there(x: Any, device: str) -> Any:
    """A tensor or masks on the device, in the same layout."""
    if isinstance(x, RegionMasks):
        return RegionMasks(layouts.moved(x.packed, device), x.size)
    return layouts.moved(x, device) if isinstance(x, Tensor) else x


def disagreement(problem: Problem, case: Case) -> str | None:
    """Runs the problem and says what is wrong with the result; None where nothing is."""
    return globals()[f"check_{problem.op}"](problem, case, call(problem, case))


def check_connected_components(problem, case, found):
    return different("numbers", found, reference.connected_components(**problem.tensors, **problem.options))


def check_region_propagate(problem, case, found):
    expected = reference.region_propagate(**problem.tensors, **problem.options)
    return different("labels", found[0], expected[0]) or different("reliable", found[1], expected[1])


def check_correlation_rows(problem, case, found):
    t = problem.tensors
    index = t["index"].expand(t["query"].shape[0], -1)
    sampled = t["query"].flatten(2).gather(2, index.unsqueeze(1).expand(-1, t["query"].shape[1], -1))
    rows = Rows(sampled, t["key"], problem.options["scale"], found.dtype)
    info = torch.finfo(found.dtype)
    error = rows.error + info.eps * rows.p + info.smallest_normal
    wild = unbounded(t["query"], t["key"]).view(-1, 1, 1)
    return beyond("rows", found.flatten(2), rows.p, error, wild)


class Rows:
    """Rows of P in float64, and the error that a computation in the dtypes of `maps` may make.

    Attributes:
        p: (B, N_q, N_k).
        slack: (B, N_q): relative error of a row.
        lost: What of an entry may be lost to underflow.
        error: (B, N_q, N_k): of an entry; inf in rows whose scores may leave the range.
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float | None, *others: torch.dtype, rounding: float = 0.0):
        self.dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype, *others) else torch.float32
        info, depth = torch.finfo(self.dtype), query.shape[1]
        scale = depth**-0.5 if scale is None else scale
        q, k = (x.double().flatten(2) for x in (query, key))
        self.p = reference.correlation(q, k, scale)
        product = (q.abs().mT @ k.abs()).amax(2)
        size, large = abs(scale) * product, 2 * abs(scale) * q.abs().amax(1)
        lost = info.smallest_normal * (1 + abs(scale)) * depth * k.abs().amax((1, 2)).unsqueeze(1)  # to underflow
        self.slack = 2 * (depth + 8) * info.eps * (1 + size) + 2 * k.shape[2] * info.eps + 2 * rounding + 2 * lost
        tight = torch.maximum(torch.maximum(2 * size, large), product) < info.max / 4
        if rounding > 0:
            tight &= self.slack < 80  # beyond, an entry that should be 1 may leave the range
        self.lost = 4 * info.smallest_normal if rounding == 0 else 2.0**-32  # the least of float16, before the bias
        # In half types rows are not divided by their sum, and may add up to more than 1.
        limit = float("inf") if rounding > 0 else 1.0
        factor = torch.expm1(self.slack).clamp(max=info.max).unsqueeze(2)  # 0 times that is 0
        error = (self.p * factor).clamp(max=limit) + self.lost
        self.error = torch.where(tight.unsqueeze(2), error, float("inf"))


def check_pixel_propagate(problem, case, found):
    t, options = problem.tensors, problem.options
    maps = {k: t[k].double().detach().requires_grad_() for k in ("query", "key", "value")}
    wide = {**t, **maps}
    if "confidence" in t:
        wide["confidence"] = t["confidence"].double()
    expected = reference.pixel_propagate(**wide, **options)
    grad = problem.grad.double()
    gradients = torch.autograd.grad(expected, list(maps.values()), grad, retain_graph=False)

    value, positions = t["value"], t["query"].flatten(2).shape[2]
    common = torch.promote_types(torch.promote_types(t["query"].dtype, t["key"].dtype), value.dtype)
    rounding = torch.finfo(common).eps if case.name == "triton" and common.itemsize == 2 else 0.0
    rows = Rows(t["query"], t["key"], options["scale"], value.dtype, rounding=rounding)
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
    return wrong or check_gradients(problem, rows, gate, rounding, found[1:], gradients)


def check_gradients(problem, rows, gate, rounding, found, expected):
    """Of pictures whose numbers and scores are well in range."""
    t = problem.tensors
    inputs = (t["query"], t["key"], t["value"], problem.grad)
    info, largest = torch.finfo(rows.dtype), min(torch.finfo(x.dtype).max for x in inputs) ** 0.5
    slack = torch.where(gate, rows.slack, 0).amax(1)
    opened = gate.unsqueeze(2)
    tight = torch.where(opened, rows.error, 0).isfinite().all((1, 2)) & (slack < 0.1)
    for x in inputs:
        tight &= (x.double().abs() < largest).flatten(1).all(1)
    p, mass = torch.where(opened, rows.p, 0), None
    if problem.options["normalize"]:
        mass = p.sum(1, keepdim=True)
        tight &= (mass > 1e-3).all((1, 2))
    kept = tight.nonzero().flatten()
    count = sum(x.shape[1] * x.shape[2:].numel() for x in inputs)
    relative = torch.expm1(4 * slack[kept] + 8 * count * info.eps + 16 * rounding).view(-1, 1, 1)
    p = torch.where(opened[kept], p[kept].maximum(rows.lost / relative), 0)
    sizes = terms(p, None if mass is None else mass[kept], problem.options["scale"], *(x[kept] for x in inputs))
    largest = torch.stack([x.double().flatten(1).abs().amax(1) for x in inputs[:2]]).amax(0)[kept].view(-1, 1, 1)
    scale = problem.options["scale"]
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
    """What is added up for the gradients of query, key and value, without signs: errors are in proportion to it."""
    q, k, v, g = (x.double().flatten(2).abs() for x in (query, key, value, grad))
    shares = v.mT @ g  # <V_i, G_j>
    if mass is not None:
        g = g / mass
        shares = v.mT @ g + ((v @ p / mass) * g).sum(1, keepdim=True)
    scores = abs(query.shape[1] ** -0.5 if scale is None else scale) * p
    scores = scores * (shares + (p * shares).sum(2, keepdim=True))
    return k @ scores.mT, q @ scores, g @ p.mT


def check_region_masks(problem, case, found):
    t, options = problem.tensors, problem.options
    size, threshold = options["size"], options["threshold"]
    index = t["index"].expand(t["query"].shape[0], -1)
    sampled = t["query"].flatten(2).gather(2, index.unsqueeze(1).expand(-1, t["query"].shape[1], -1))
    rows = Rows(sampled, t["key"], options["scale"])
    grid = t["key"].shape[2:]
    if index.numel() == 0:
        return None if found.packed.numel() == 0 else "masks of nothing"
    large = F.interpolate(rows.p.unflatten(2, grid), size=size, mode="bilinear", align_corners=True).flatten(2)
    low, high = large.amin(2, keepdim=True), large.amax(2, keepdim=True)
    eps = torch.finfo(rows.dtype).eps
    # Computed are P / high or the like: errors are relative to the largest.
    lost = 4 * torch.finfo(rows.dtype).smallest_normal
    slack = ((4 * torch.expm1(rows.slack).unsqueeze(2) + 64 * eps) * high + lost) / (high - low)
    slack = torch.where(rows.error.isfinite().all(2, keepdim=True), slack, float("inf"))
    position, constant = (large - low) / (high - low), ~(high > low)
    whole = found
    if options["connected"] is not None:
        whole = call(Problem(problem.op, t, {**options, "connected": None}), case)
    whole, kept = whole.to_bool().flatten(2).cpu(), found.to_bool().flatten(2).cpu()
    expected = (position > threshold) & ~constant
    near = (position - threshold).abs() <= slack
    near |= constant & rows.slack.isfinite().unsqueeze(2) & (rows.slack.unsqueeze(2) > 0)  # by rounding not constant
    wild = rows.p.isnan().any(2, keepdim=True) & unbounded(t["query"], t["key"]).view(-1, 1, 1)
    near |= ~(slack < float("inf")) & ~wild
    wrong = ((whole != expected) & ~near).nonzero()
    if len(wrong):
        return f"masks differ at {wrong[0].tolist()}, value {position[tuple(wrong[0])]:.9g}, of {len(wrong)}"
    if options["connected"] is None:
        return None
    parts = reference.connected_components(whole.unflatten(2, size), connectivity=options["connectivity"]).flatten(2)
    seeds = reference.enlarged_position(index, t["query"].shape[2:], size)
    for b in range(whole.shape[0]):
        for k in range(whole.shape[1]):
            names = parts[b, k][kept[b, k]].unique().tolist()
            if len(names) > 1 or 0 in names or (names and not torch.equal(kept[b, k], parts[b, k] == names[0])):
                return f"mask {b}, {k} is not a component"
            if options["connected"] == "seed":
                at = int(parts[b, k, seeds[b, k]])
                if names != ([at] if at else []):
                    return f"mask {b}, {k} is not that of its seed"
            elif slack[b, k] < 0.01 and threshold < 0.98 and not constant[b, k]:
                highest = position[b, k][kept[b, k]].tolist()
                if max(highest, default=0) < 1 - 2 * slack[b, k]:
                    return f"mask {b}, {k} is not that of the peak"
    return None


def check_pseudo_label(problem, case, found):
    logits, ignore, size = problem.tensors["logits"], problem.tensors.get("ignore"), problem.options["size"]
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


def check_cross_entropy(problem, case, found):
    """The terms of pixels whose logits are well in range; the loss is their sum."""
    t = problem.tensors
    weight, maps = t["weight"].double(), [t[name] for name in ("logits", "target") if name in t]
    wide = {k: x.double() if x.is_floating_point() else x for k, x in t.items()}
    _, expected = getattr(reference, problem.op)(**wide)
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


check_divergence = check_cross_entropy


def different(name: str, found: Tensor, expected: Tensor) -> str | None:
    """Where two tensors are not equal."""
    found = found.cpu()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{name}: {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    wrong = (found != expected).nonzero()
    if len(wrong) == 0:
        return None
    at = tuple(wrong[0])
    return f"{name} at {wrong[0].tolist()}: {found[at]}, expected {expected[at]}; {len(wrong)} of {found.numel()}"


def unbounded(*maps: Tensor) -> Tensor:
    """Pictures with a number that is not finite: bool (B,)."""
    return torch.stack([~x.isfinite().flatten(1).all(1) for x in maps]).any(0)


def beyond(name: str, found: Tensor, expected: Tensor, bound: Tensor, wild: Tensor | None = None) -> str | None:
    """Where a number is farther from the expected one than the bound.

    Where the input is `wild` and the expected number not finite, the one found must not be either; where it only left
    the range of float64, anything goes.
    """
    found = found.cpu().double()
    close = ((found - expected).abs() <= bound) | (bound == float("inf"))
    fair = ~found.isfinite() | ~(torch.zeros((), dtype=torch.bool) if wild is None else wild)
    wrong = (~torch.where(expected.isfinite(), close, fair)).nonzero()
    if len(wrong) == 0:
        return None
    at = tuple(wrong[0])
    return (
        f"{name} at {wrong[0].tolist()}: {found[at]:.9g}, expected {expected[at]:.9g} within {bound[at]:.2g}; "
        f"{len(wrong)} of {found.numel()}"
    )
