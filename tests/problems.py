"""Random calls of every op for `fuzz.py`: shapes, layouts, dtypes, options and numbers that a caller may pass."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import layouts
import torch
from backends import FLOATING
from torch import Tensor

from corrmatch import RegionMasks
from corrmatch.dtypes import accumulation

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NAN, INF = float("nan"), float("inf")


@dataclass
class Problem:
    """One call: `tensors` and `options` are the keyword arguments of the op.

    Attributes:
        threads: Threads of the CPU kernels.
        grad: Gradient of the result, where gradients are computed.
    """

    op: str
    tensors: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    grad: Tensor | None = None

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{name} {str(x.dtype)[6:]} {tuple(x.shape)}" for name, x in self.tensors.items() if isinstance(x, Tensor)
        )
        return f"{self.op}({shapes}, {', '.join(f'{k}={v}' for k, v in self.options.items())})"


def problem(seed: int, index: int) -> Problem:
    """The problem of that number: the same one every time."""
    r = random.Random(f"{seed}/{index}")
    torch.manual_seed(r.getrandbits(60))
    made = r.choices(list(MAKERS), list(MAKERS.values()))[0](r)
    made.threads = r.choice((1, 1, 2, 3))
    return made


def side(r: random.Random) -> tuple[int, int]:
    """A grid: mostly small, now and then a long strip."""
    if r.random() < 0.15:
        strip = (1, r.randint(1, 150))
        return strip if r.random() < 0.5 else strip[::-1]
    return r.randint(1, 12), r.randint(1, 12)


def channels(r: random.Random) -> int:
    return r.choice((1, 2, 3, 4, 5, 8, 13, 16, 17, 21, 31, 33)) if r.random() < 0.97 else r.choice((64, 150, 256))


def numbers(r: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Floating numbers of a kind."""
    x = torch.randn(shape, dtype=torch.float64) * r.choice((0.1, 1, 1, 1, 3))
    info = torch.finfo(dtype)
    largest = min(info.max, 1e100)  # products of two are in the range of the oracle
    kind = r.random()
    if kind < 0.05:
        x = torch.full_like(x, r.choice((0.0, 1.0, -3.0, largest, info.tiny, -0.0)))
    elif kind < 0.1:
        x = torch.randint(-2, 3, shape).double()
    elif kind < 0.2:
        x *= r.choice((20, 1e3, 1e10, 1e30, 1e100))
    elif kind < 0.3:
        x *= r.choice((1e-3, 1e-10, 1e-30, 1e-39, 1e-42, info.tiny, info.smallest_normal))
    x = x.clamp(-largest, largest).to(dtype)
    if kind > 0.8 and x.numel() > 0:
        spikes = (NAN, INF, -INF) if r.random() < 0.5 else (largest, -largest, info.tiny / 2, 0.0)
        for _ in range(r.choice((1, 1, 3))):
            x.view(-1)[r.randrange(x.numel())] = r.choice(spikes)
    return x


def placed(r: random.Random, x: Tensor, repeats: bool = True) -> Tensor:
    """The tensor somewhere else in memory; where it `repeats`, sometimes one slice of it again and again."""
    if x.numel() == 0 or x.dim() < 2 or r.random() < 0.4:
        return x
    if repeats and r.random() < 0.15:
        dim = r.randrange(x.dim())
        return x.narrow(dim, 0, 1).expand(x.shape)
    choices = layouts.MAPS if x.dim() == 4 else layouts.ANY
    return r.choice(list(choices.values()))(x)


def flags(r: random.Random, *shape: int) -> Tensor:
    return placed(r, torch.rand(shape) < r.choice((0.0, 0.1, 0.5, 0.8, 0.95, 1.0)))


def dtypes(r: random.Random, count: int) -> list[torch.dtype]:
    """Mostly one for all."""
    first = r.choice(FLOATING)
    return [first if r.random() < 0.9 else r.choice(FLOATING) for _ in range(count)]


def features(r: random.Random, flat: bool, count: int = 2) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Query, key and, where three are wanted, value; and the grids of query and key."""
    batch, depth, values = r.choice((0, 1, 1, 2, 3)), channels(r), channels(r)
    grids = [(side(r)), (side(r))]
    if r.random() < 0.3:
        grids[1] = grids[0]
    shapes = [tuple(grid) if not flat else (grid[0] * grid[1],) for grid in grids]
    kinds = dtypes(r, count)
    wanted = ((depth, shapes[0]), (depth, shapes[1]), (values, shapes[0]))[:count]
    return [placed(r, numbers(r, d, batch, c, *s)) for d, (c, s) in zip(kinds, wanted, strict=True)], shapes


def scale(r: random.Random) -> float | None:
    return r.choice((None, None, None, 1.0, 0.0, -0.7, 1e-3, 25.0, 1e8, 1e-30))


def pixel_propagate(r: random.Random) -> Problem:
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
    return Problem("pixel_propagate", tensors, options, grad=placed(r, grad))


def between(r: random.Random, values: Tensor) -> float:
    """A number that none of the values is near, for their comparison must not depend on rounding."""
    known = values.double().flatten()
    known = known[known.abs() < 1e30].sort().values
    if known.numel() == 0:
        return 0.5
    edges = torch.cat([known[:1] - known[:1].abs() - 1, known, known[-1:] + known[-1:].abs() + 1])
    gaps = edges.diff()
    wide = (gaps > 1e-3 * (1 + edges[1:].abs())).nonzero().flatten().tolist()
    at = r.choice(wide)  # the first and the last are wide: all open, all closed
    return float(edges[at] + gaps[at] / 2)


def row_index(r: random.Random, query: Tensor) -> Tensor:
    positions = query.flatten(2).shape[2]
    shape = (r.randint(0, 9),) if r.random() < 0.5 else (query.shape[0], r.randint(0, 9))
    return placed(r, torch.randint(positions, shape))


def correlation_rows(r: random.Random) -> Problem:
    (query, key), _ = features(r, flat=r.random() < 0.3)
    key = key.to(query.dtype)
    return Problem("correlation_rows", {"query": query, "key": key, "index": row_index(r, query)}, {"scale": scale(r)})


def region_masks(r: random.Random) -> Problem:
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
    return Problem("region_masks", {"query": query, "key": key, "index": row_index(r, query)}, options)


def region_propagate(r: random.Random) -> Problem:
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
    return Problem("region_propagate", tensors, {"threshold": threshold, "num_classes": classes})


def connected_components(r: random.Random) -> Problem:
    lead = r.choice(((), (1,), (2,), (2, 3), (0,)))
    dtype = r.choice((torch.bool, *INTEGERS))
    image = torch.randint(r.choice((1, 2, 2, 3, 5)), (*lead, r.randint(0, 40), r.randint(0, 140)))
    background = r.choice((0, 0, 1, -1, 300, 2**63 - 1))
    if dtype not in (torch.bool, torch.uint8) and r.random() < 0.3:
        image -= 2
    tensors = {"image": placed(r, image.to(dtype))}
    return Problem("connected_components", tensors, {"connectivity": r.choice((4, 8)), "background": background})


def pseudo_label(r: random.Random) -> Problem:
    batch, (height, width) = r.choice((0, 1, 1, 2, 3)), side(r)
    logits = numbers(r, r.choice(FLOATING), batch, channels(r), height, width)
    size = r.choice((None, (r.randint(1, 40), r.randint(1, 40)), (3 * height - 2, 4 * width - 3)))
    tensors = {"logits": placed(r, logits)}
    if r.random() < 0.6:
        tensors["ignore"] = flags(r, batch, *(size or (height, width)))
    return Problem("pseudo_label", tensors, {"size": size})


def loss(r: random.Random) -> tuple[dict[str, Any], int, torch.dtype]:
    batch, (height, width), dtype = r.choice((0, 1, 1, 2, 3)), side(r), r.choice(FLOATING)
    logits = numbers(r, dtype, batch, channels(r), height, width)
    sizes = ((height, width), (r.randint(1, 40), r.randint(1, 40)), (3 * height - 2, 4 * width - 3))
    shape = (batch, *r.choice(sizes))
    weight = torch.rand(shape) * (torch.rand(shape) < r.choice((0.0, 0.5, 1.0))) * r.choice((1, 1e-6))
    return {"logits": placed(r, logits), "weight": placed(r, weight.to(r.choice(FLOATING)))}, logits.shape[1], dtype


def cross_entropy(r: random.Random) -> Problem:
    tensors, classes, _ = loss(r)
    dtype = r.choice([x for x in INTEGERS if classes <= torch.iinfo(x).max])
    labels = torch.randint(classes, tensors["weight"].shape).to(dtype)
    if r.random() < 0.5:  # what does not count may be anything
        labels[tensors["weight"] == 0] = r.choice((torch.iinfo(dtype).max, torch.iinfo(dtype).min))
    return Problem("cross_entropy", {**tensors, "labels": placed(r, labels, repeats=False)})


def divergence(r: random.Random) -> Problem:
    tensors, _, dtype = loss(r)
    target = numbers(r, dtype, *tensors["logits"].shape)
    return Problem("divergence", {**tensors, "target": placed(r, target)})


MAKERS = {
    pixel_propagate: 8,
    correlation_rows: 2,
    region_masks: 4,
    region_propagate: 3,
    connected_components: 3,
    pseudo_label: 4,
    cross_entropy: 3,
    divergence: 2,
}  # and how often each
