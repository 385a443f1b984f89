"""Region masks: see `support`."""

from __future__ import annotations

import dataclasses
import random

import torch
import torch.nn.functional as F
import wrong_arguments
from bounds import RowsOfP, unbounded
from contracts import FLOATING, lent
from layouts import wide
from random_inputs import RandomCall, features, maps, row_index, scale
from wrong_arguments import INDEX, INF, K, Q

from corrmatch import ops, reference

FUNCTIONS = ("region_masks",)


def sample(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device)]
    index = torch.randint(size[0] * size[1], (5,), device=device)

    def call(q, k, i):
        return ops.region_masks(q, k, i, (4 * q.shape[2] - 3, 4 * q.shape[3] - 3), **options).packed

    return call, [*arguments, index]


def peak(size=(7, 9), device="cpu", **options):
    return sample(size, device, connected="peak", threshold=0.2, **options)


SAMPLES = {"region_masks": sample, "region_masks_peak": peak}
DIFFERENTIABLE = ()


def random_region_masks(r: random.Random) -> RandomCall:
    (query, key), _ = features(r, flat=False)
    size = (r.randint(1, 40), r.randint(1, 40))
    if r.random() < 0.3:  # grid points that coincide with pixels
        size = tuple((n - 1) * r.randint(1, 4) + 1 for n in key.shape[2:])
    options = {
        "size": size,
        "scale": scale(r),
        "threshold": r.choice((0.5, 0.5, 0.2, 0.9, 0.01, -0.5, 1.5)),
        "connected": r.choice((None, "peak", "seed")),
        "connectivity": r.choice((4, 8)),
    }
    tensors = {"query": query, "key": key, "index": row_index(r, query)}
    return RandomCall("region_masks", disagreement, tensors, options)


def disagreement(random_call, target, found):
    t, options = random_call.tensors, random_call.options
    size, threshold = options["size"], options["threshold"]
    index = t["index"].expand(t["query"].shape[0], -1)
    sampled = t["query"].flatten(2).gather(2, index.unsqueeze(1).expand(-1, t["query"].shape[1], -1))
    rows = RowsOfP(sampled, t["key"], options["scale"])
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
        whole = dataclasses.replace(random_call, options={**options, "connected": None}).on(target)
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


RANDOM = {random_region_masks: 4}


def contract(query, key, index, height, width, scale, threshold, connected, connectivity, packed, threads):
    batch, depth = query.shape[:2]
    lent(query, FLOATING, batch, depth, *query.shape[2:4])
    lent(key, FLOATING, batch, depth, *key.shape[2:4])
    lent(index, (torch.int64,), batch, index.shape[1])
    assert min(height, width) >= 1
    assert connected in (0, 1, 2)
    assert connectivity in (4, 8)
    lent(packed, (torch.int32,), batch, index.shape[1], -(-height * width // 32), contiguous=True)
    assert min(query.numel(), key.numel()) > 0


CONTRACT = {"region_masks": contract}


def call(query=Q, key=K, index=INDEX, size=(9, 8), **options):
    return ops.region_masks(query, key, index, size, **options)


VALID = (call,)
WRONG = [
    *wrong_arguments.query_key(call),
    *wrong_arguments.index(call),
    (call, {"query": Q.flatten(2)}, ValueError, "query: expected shape (B, channels, H, W), got (2, 3, 20)"),
    (call, {"key": K.flatten(2)}, ValueError, "key: expected shape (B, channels, H, W), got (2, 3, 12)"),
    *wrong_arguments.size(call),
    (call, {"threshold": torch.tensor(0.5)}, TypeError, "threshold: expected a number, got Tensor"),
    (call, {"threshold": "a"}, TypeError, "threshold: expected a number, got str"),
    (call, {"threshold": INF}, ValueError, "threshold: expected a finite number, got inf"),
    (call, {"connected": "foo"}, ValueError, "connected: expected one of None, 'peak', 'seed', got 'foo'"),
    (call, {"connected": True}, ValueError, "connected: expected one of None, 'peak', 'seed', got True"),
    *wrong_arguments.connectivity(call),
    *wrong_arguments.backend(call),
]
DENSE = [(call, {}, "query", Q), (call, {}, "key", K), (call, {}, "index", INDEX.expand(2, -1))]
TOO_LARGE = {"query": lambda: ops.region_masks(*[wide(1, 2, 2**16, 2**15)] * 2, torch.arange(3), (9, 9))}


def opcheck_others():
    return iter(())


def opcheck_calls():
    index, query, key = torch.randint(20, (2, 6)), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 3, 2)
    for connected in (0, 1, 2):
        yield torch.ops.corrmatch.region_masks.default, (query, key, index, 9, 7, 0.5, 0.3, connected, 8)
    arguments = (query.double(), key.half(), index[:, :0], 9, 7, 0.5, 0.3, 0, 4)
    yield torch.ops.corrmatch.region_masks.default, arguments
