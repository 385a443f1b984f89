"""What is measured: for each op the inputs, the contenders, the oracle's answer and the distance from it.

The oracle is `corrmatch.reference` on the inputs in float64. Nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
import torch
import torch.nn.functional as F
from measure import Contender
from torch import Tensor
from workload import (
    Case,
    Setting,
    largest,
    largest_relative_error,
    percent,
    share_different,
    smooth,
    smooth_features,
)

from corrmatch import RegionMasks, ops, reference

THRESHOLD = 0.85  # of region propagation: Pascal VOC's
ROWS = (64, 128, 256)  # of the row-chunked peer
COMPONENT_LIBRARIES = ("scipy", "OpenCV", "cc3d")
PICTURES = 64  # binary pictures at once, on a GPU
ORACLE_SIDE = 321  # the oracle of components sweeps once for each pixel of the longest path: seconds; minutes at 801
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def pixel_propagate(s: Setting) -> Iterator[Case]:
    """The peers, forward and backward."""
    generator, (height, width) = s.generator(), s.grid
    query, key, value, upstream = (
        torch.randn(s.batch, s.channels, height, width, generator=generator).to(s.device, s.dtype) for _ in range(4)
    )
    leaves = [query, key, value] if s.value_grad else [query, key]
    for leaf in leaves:
        leaf.requires_grad_()

    def contender(name: str, f: peers.Propagate, backward: bool = True, **rest: Any) -> Contender:
        grads = {"leaves": tuple(leaves), "upstream": upstream} if backward else {}
        return Contender(name, lambda: f(query, key, value), **grads, **rest)

    contenders = [contender("corrmatch", ops.pixel_propagate, ours=True)]
    contenders += [
        contender(f"row-chunked, {rows} rows", peers.row_chunked(rows), family="row-chunked") for rows in ROWS
    ]
    if s.device == "cpu":
        composition = peers.attention_composition(peers.cpu_attention)
        contenders.append(contender("attention composition", composition, backward=False))
    else:
        composition = peers.attention_composition(peers.flex_attention(), power_of_two=True)
        contenders.append(_compiled(contender("FlexAttention composition", composition)))
    contenders.append(contender("published eager", peers.published))
    if s.compiled or s.device == "cuda":
        compiled = torch.compile(peers.published, dynamic=False)
        contenders.append(_compiled(contender("published, compiled", compiled)))

    def expected() -> tuple[Tensor, ...]:
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (query, key, value)]
        out = reference.pixel_propagate(*exact)
        wanted = [x for x in exact if x.requires_grad]
        return out.detach(), *torch.autograd.grad(out, wanted, upstream.double())

    positions = height * width
    yield Case(
        "pixel_propagate", f"{height}x{width}, B = {s.batch}", s.batch * positions**2, "elements of the map",
        f"N = {positions}, D = C = {s.channels}", contenders, expected, largest_relative_error, TOLERANCE[s.dtype],
        positions, s.batch,
        oracle_bytes=6 * 8 * s.batch * positions**2,
        exponentials={"forward": 2 * s.batch * positions**2, "both": 4 * s.batch * positions**2},
    )  # fmt: skip


def _compiled(contender: Contender) -> Contender:
    """The contender, which compiles both its forms, without and with gradients, when it is compared with the oracle.

    Of one function torch keeps eight forms, and each size has several: `torch.compiler.reset()` comes before each size.
    """

    def answer() -> tuple[Any, ...]:
        with torch.no_grad():
            contender.forward()
        return contender.both()

    contender.answer, contender.compiles = answer, True
    return contender


def region_masks(s: Setting) -> Iterator[Case]:
    """Masks from the rows of smooth features."""
    query, key, index = smooth_features(s)
    size, (height, width) = s.full, s.grid
    contenders = [
        Contender("corrmatch", lambda: ops.region_masks(query, key, index, size), ours=True),
        Contender("eager, 8 masks at once", lambda: peers.region_masks_chunked(query, key, index, size)),
        Contender("published eager", lambda: peers.region_masks(query, key, index, size)),
    ]

    def expected() -> tuple[RegionMasks]:
        return (reference.region_masks(query.double(), key.double(), index, size),)

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        masks = got[0].to_bool() if isinstance(got[0], RegionMasks) else got[0]
        return share_different(masks, want[0].to_bool())

    pixels = s.batch * index.shape[0] * size[0] * size[1]
    yield Case(
        "region_masks", f"{height}x{width} to {size[0]}x{size[1]}, B = {s.batch}", pixels, "mask pixels",
        f"K = {index.shape[0]} masks a picture, D = {s.channels}", contenders, expected, error, TOLERANCE[s.dtype],
        height * width, s.batch, oracle_bytes=4 * 8 * pixels,
    )  # fmt: skip


def region_propagate(s: Setting) -> Iterator[Case]:
    """Masks of smooth features over smooth labels, so that some regions are accepted and some not."""
    query, key, index = smooth_features(s)
    size, generator = s.full, s.generator()
    masks = ops.region_masks(query, key, index, size)
    as_bool = masks.to_bool()
    # Classes follow some of the features' channels, so that many regions lie in one class and many do not.
    labels = F.interpolate(query[:, : s.channels // 3].float(), size=size, mode="bilinear").argmax(1)
    doubt = smooth(s.batch, 1, size, 8, generator)[:, 0]
    reliable = (doubt < doubt.flatten().kthvalue(int(0.85 * doubt.numel())).values).to(s.device)
    arguments = (as_bool, THRESHOLD, s.channels)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.region_propagate(labels, reliable, masks, THRESHOLD, num_classes=s.channels)

    contenders = [Contender("corrmatch", ours, ours=True)]
    if s.device == "cpu":
        contenders.append(Contender("NumPy loop", lambda: peers.region_propagate_numpy(labels, reliable, *arguments)))
    published = Contender("published loop", lambda: peers.region_propagate(labels, reliable, *arguments), on_host=True)
    contenders.append(published)

    def expected() -> tuple[tuple[Tensor, Tensor]]:
        return (reference.region_propagate(labels, reliable, masks, THRESHOLD, num_classes=s.channels),)

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        return largest(share_different(x, y) for x, y in zip(got[0], want[0], strict=True))

    after, reliable_after = ours()
    count = index.shape[0]
    yield Case(
        "region_propagate", f"{size[0]}x{size[1]}, B = {s.batch}", as_bool.numel(), "mask pixels",
        f"K = {count}, C = {s.channels}; {percent(after != labels)} of the pixels change, reliable are "
        f"{percent(reliable)}, then {percent(reliable_after)}", contenders, expected, error, 0.0, size[0] * size[1],
        s.batch, oracle_bytes=4 * as_bool.numel(),
    )  # fmt: skip


def connected_components(s: Setting) -> Iterator[Case]:
    """Binary pictures, one on a CPU and many at once on a GPU: smooth blobs, then noise."""
    size, generator, batch = s.full, s.generator(), PICTURES if s.device == "cuda" else 1
    pictures = {
        "smooth blobs": smooth(batch, 1, size, max(2, size[0] // 16), generator)[:, 0] > 0,
        "noise, half of the pixels set": torch.rand(batch, *size, generator=generator) < 0.5,
    }
    for kind, images in pictures.items():
        yield _component_case(kind, images.to(s.device, torch.uint8))


def _component_case(kind: str, images: Tensor) -> Case:
    """Compared with the oracle where that is quick, else a corner is, and the whole with an independent library."""
    batch, height, width = images.shape
    crop = images[:1, :ORACLE_SIDE, :ORACLE_SIDE].contiguous()
    arrays = {id(x): list(x.cpu().numpy()) for x in (images, crop)}
    libraries = peers.component_peers(connectivity=8)
    cupyx = peers.cupyx_components(connectivity=8) if images.is_cuda else None

    def contender(name: str, f: Callable[[Tensor], Any], **rest: Any) -> Contender:
        return Contender(name, lambda: f(images), answer=lambda: (f(crop), f(images)), **rest)

    def peer(name: str) -> Contender:
        if name not in libraries:
            return Contender(name, lambda: None, missing="not installed")
        return contender(name, lambda x: _Numbered([libraries[name](a) for a in arrays[id(x)]]), on_host=True)

    def expected() -> tuple[np.ndarray, np.ndarray]:
        exact = reference.connected_components(crop).cpu().numpy()
        if crop.shape == images.shape:
            return exact, exact
        witness = next(iter(libraries.values())) if libraries else None
        if witness is None:
            return exact, ops.connected_components(images).cpu().numpy()
        return exact, np.stack([raster_order(witness(a)) for a in arrays[id(images)]])

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        answers = (x.in_raster_order() if isinstance(x, _Numbered) else x.cpu().numpy() for x in got)
        return largest(float((x != y).mean()) for x, y in zip(answers, want, strict=True))

    contenders = [contender("corrmatch", ops.connected_components, ours=True)]
    contenders += [peer(name) for name in COMPONENT_LIBRARIES]
    if cupyx is not None:
        contenders.append(contender("cupyx", lambda x: _Numbered([cupyx(image) for image in x]), on_host=True))
    return Case(
        "connected_components", f"{height}x{width}, B = {batch}", images.numel(), "pixels", f"{kind}, 8-connectivity",
        contenders, expected, error, 0.0, height * width, batch,
        share=0.5,
    )  # fmt: skip


@dataclass
class _Numbered:
    """Components as a library numbers them, a picture each: any order will do."""

    labels: list[Any]

    def in_raster_order(self) -> np.ndarray:
        return np.stack([raster_order(np.asarray(torch.as_tensor(x).cpu())) for x in self.labels])


def raster_order(labels: np.ndarray) -> np.ndarray:
    """Components numbered from 1 in raster order of their first pixel; 0 stays."""
    names, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    first[names == 0] = -1
    rank = np.empty(len(names), np.int64)
    rank[first.argsort()] = np.arange(len(names))
    return (rank if (names == 0).any() else rank + 1)[inverse].reshape(labels.shape)


def pseudo_label(s: Setting) -> Iterator[Case]:
    """Smooth logits, enlarged."""
    size, (height, width) = s.full, s.grid
    logits = (4 * smooth(s.batch, s.channels, s.grid, 6, s.generator())).to(s.device, s.dtype)
    contenders = [
        Contender("corrmatch", lambda: ops.pseudo_label(logits, size=size), ours=True),
        Contender("eager, logsumexp", lambda: peers.pseudo_label_logsumexp(logits, size)),
        Contender("eager, softmax", lambda: peers.pseudo_label(logits, size)),
    ]

    def expected() -> tuple[Any, ...]:
        return (reference.pseudo_label(logits.double(), size=size),)

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        return largest([share_different(got[0][0], want[0][0]), largest_relative_error(got[0][1:], want[0][1:])])

    pixels = s.batch * size[0] * size[1]
    yield Case(
        "pseudo_label", f"{height}x{width} to {size[0]}x{size[1]}, B = {s.batch}", pixels, "pixels",
        f"C = {s.channels}", contenders, expected, error, TOLERANCE[s.dtype], height * width, s.batch,
        oracle_bytes=4 * 8 * s.channels * pixels,
    )  # fmt: skip


def pixel_loss(s: Setting) -> Iterator[Case]:
    """Cross-entropy of enlarged logits, a third of the pixels left out, forward and backward."""
    size, (height, width) = s.full, s.grid
    generator = s.generator()
    logits = (4 * smooth(s.batch, s.channels, s.grid, 6, generator)).to(s.device, s.dtype).requires_grad_()
    labels = torch.randint(s.channels, (s.batch, *size), generator=generator).to(s.device)
    kept = torch.rand(s.batch, *size, generator=generator) < 0.7
    weight = (kept / kept.sum()).to(s.device)

    def contender(name: str, f: Callable[..., Tensor], **rest: Any) -> Contender:
        upstream = torch.ones((), device=s.device)
        return Contender(name, lambda: f(logits, labels, weight), leaves=(logits,), upstream=upstream, **rest)

    contenders = [
        contender("corrmatch", lambda *x: ops.cross_entropy(*x)[0], ours=True),
        contender("eager", peers.cross_entropy),
    ]

    def expected() -> tuple[Any, ...]:
        wide = logits.detach().double().requires_grad_()
        loss, _ = reference.cross_entropy(wide, labels, weight.double())
        return loss.detach(), *torch.autograd.grad(loss, wide)

    pixels = s.batch * size[0] * size[1]
    yield Case(
        "pixel_loss", f"{height}x{width} to {size[0]}x{size[1]}, B = {s.batch}", pixels, "pixels",
        f"C = {s.channels}", contenders, expected, largest_relative_error, TOLERANCE[s.dtype], height * width, s.batch,
        oracle_bytes=6 * 8 * s.channels * pixels,
    )  # fmt: skip


OPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    f.__name__: f
    for f in (pixel_propagate, region_masks, region_propagate, connected_components, pseudo_label, pixel_loss)
}
