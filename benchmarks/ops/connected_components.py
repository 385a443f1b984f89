"""Connected components: corrmatch and the installed libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness.case import Benchmark, Case, Setting, largest, smooth
from harness.measure import Contender
from torch import Tensor

from corrmatch import ops, reference

COMPONENT_LIBRARIES = ("scipy", "OpenCV", "cc3d")
IMAGES = 64  # binary images of a call, on a GPU
ORACLE_SIDE = 321  # the oracle of components sweeps once for each pixel of the longest path: seconds; minutes at 801


def component_peers(connectivity: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Connected components of a binary image by the installed libraries."""
    peers: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if importlib.util.find_spec("scipy"):
        from scipy import ndimage

        structure = np.ones((3, 3)) if connectivity == 8 else None
        peers["scipy"] = lambda image: ndimage.label(image, structure)[0]
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(torch.get_num_threads())
        peers["OpenCV"] = lambda image: cv2.connectedComponents(image, connectivity=connectivity)[1]
    if importlib.util.find_spec("cc3d"):
        import cc3d

        peers["cc3d"] = lambda image: cc3d.connected_components(image, connectivity=connectivity)
    return peers


def cupyx_components(connectivity: int) -> Callable[[Tensor], Tensor] | None:
    """Connected components of a binary image on a GPU by CuPy, if it is installed."""
    if importlib.util.find_spec("cupyx") is None:
        return None
    import cupy
    from cupyx.scipy import ndimage

    structure = cupy.ones((3, 3)) if connectivity == 8 else None
    return lambda image: torch.from_dlpack(ndimage.label(cupy.from_dlpack(image), structure)[0])


def cases(s: Setting) -> Iterator[Case]:
    """Binary images, one on a CPU and many on a GPU: smooth blobs, then noise."""
    size, generator, batch = s.full, s.generator(), IMAGES if s.device == "cuda" else 1
    kinds = {
        "smooth blobs": smooth(batch, 1, size, max(2, size[0] // 16), generator)[:, 0] > 0,
        "noise, half of the pixels set": torch.rand(batch, *size, generator=generator) < 0.5,
    }
    for kind, images in kinds.items():
        yield _component_case(kind, images.to(s.device, torch.uint8))


def _component_case(kind: str, images: Tensor) -> Case:
    """Compares with the oracle if it is quick; else compares a corner, and the whole with an independent library."""
    batch, height, width = images.shape
    crop = images[:1, :ORACLE_SIDE, :ORACLE_SIDE].contiguous()
    arrays = {id(x): list(x.cpu().numpy()) for x in (images, crop)}
    libraries = component_peers(connectivity=8)
    cupyx = cupyx_components(connectivity=8) if images.is_cuda else None

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
    """Components numbered by a library, image by image, in any order."""

    labels: list[Any]

    def in_raster_order(self) -> np.ndarray:
        return np.stack([raster_order(np.asarray(torch.as_tensor(x).cpu())) for x in self.labels])


def raster_order(labels: np.ndarray) -> np.ndarray:
    """Components numbered from 1 in raster order of their first pixels; 0 stays."""
    names, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    first[names == 0] = -1
    rank = np.empty(len(names), np.int64)
    rank[first.argsort()] = np.arange(len(names))
    return (rank if (names == 0).any() else rank + 1)[inverse].reshape(labels.shape)


BENCHMARK = Benchmark(
    "connected_components", "component numbers of a binary image", cases, sizes=((41, 41), (101, 101))
)
