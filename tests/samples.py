"""A call of every op on random inputs, for tests that go over all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corrmatch import RegionMasks, ops


def maps(batch, depth, height, width, device="cpu"):
    return torch.randn(batch, depth, height, width, device=device)


def pixel_propagate(size=(7, 9), device="cpu", **options) -> tuple[Callable[..., Tensor], list[Tensor]]:
    arguments = [maps(2, 6, *size, device), maps(2, 6, size[1], size[0], device), maps(2, 4, *size, device)]
    return lambda q, k, v: ops.pixel_propagate(q, k, v, **options), arguments


def pixel_propagate_thresholded(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device), maps(2, 4, *size, device)]
    return lambda q, k, v: ops.pixel_propagate(q, k, v, threshold=0.5, normalize=True, **options), arguments


def pixel_propagate_gated(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device), maps(2, 4, *size, device)]
    arguments += [torch.rand(2, *size, device=device), torch.tensor(0.4, device=device)]

    def call(q, k, v, confidence, threshold):
        return ops.pixel_propagate(q, k, v, confidence=confidence, threshold=threshold, **options)

    return call, arguments


def correlation_rows(size=(7, 9), device="cpu", backend=None):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device)]
    index = torch.randint(size[0] * size[1], (2, 5), device=device)
    return lambda q, k, i: ops.correlation_rows(q, k, i), [*arguments, index]


def region_masks(size=(7, 9), device="cpu", **options):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device)]
    index = torch.randint(size[0] * size[1], (5,), device=device)

    def call(q, k, i):
        return ops.region_masks(q, k, i, (4 * q.shape[2] - 3, 4 * q.shape[3] - 3), **options).packed

    return call, [*arguments, index]


def region_masks_peak(size=(7, 9), device="cpu", **options):
    return region_masks(size, device, connected="peak", threshold=0.2, **options)


def region_propagate(size=(27, 39), device="cpu", **options):
    labels = torch.randint(5, (2, *size), device=device).to(torch.uint8)
    labels[:, : size[0] // 2] = 3
    reliable, valid = (torch.rand(2, *size, device=device) < 0.8 for _ in range(2))
    masks = RegionMasks.from_bool(torch.rand(2, 6, *size, device=device) < 0.3)

    def call(labels, reliable, packed, valid, threshold):
        masks = RegionMasks(packed, (labels.shape[1], labels.shape[2]))
        return ops.region_propagate(labels, reliable, masks, threshold, num_classes=5, valid=valid, **options)

    return call, [labels, reliable, masks.packed, valid, torch.tensor(0.45, device=device)]


def connected_components(size=(40, 70), device="cpu", **options):
    image = torch.randint(3, (2, *size), device=device)
    return lambda image: ops.connected_components(image, **options), [image]


def pseudo_label(size=(7, 9), device="cpu", **options):
    arguments = [3 * maps(2, 6, *size, device), torch.rand(2, 4 * size[0], 4 * size[1], device=device) < 0.2]

    def call(logits, ignore):
        return ops.pseudo_label(logits, size=(ignore.shape[1], ignore.shape[2]), ignore=ignore, **options)

    return call, arguments


def cross_entropy(size=(7, 9), device="cpu", **options):
    height, width = 4 * size[0] - 2, 4 * size[1]
    labels = torch.randint(6, (2, height, width), device=device)
    arguments = [3 * maps(2, 6, *size, device), labels, torch.rand(2, height, width, device=device) / (height * width)]
    return lambda logits, labels, weight: ops.cross_entropy(logits, labels, weight, **options)[0], arguments


def divergence(size=(7, 9), device="cpu", **options):
    height, width = 4 * size[0] - 2, 4 * size[1]
    arguments = [3 * maps(2, 6, *size, device), torch.rand(2, height, width, device=device) / (height * width)]
    return lambda logits, weight: ops.divergence(logits, logits.detach().flip(1), weight, **options)[0], arguments


# Name of the sample: the op, and what makes the call.
SAMPLES = {
    "pixel_propagate": ("pixel_propagate", pixel_propagate),
    "pixel_propagate_thresholded": ("pixel_propagate", pixel_propagate_thresholded),
    "pixel_propagate_gated": ("pixel_propagate", pixel_propagate_gated),
    "correlation_rows": ("correlation_rows", correlation_rows),
    "region_masks": ("region_masks", region_masks),
    "region_masks_peak": ("region_masks", region_masks_peak),
    "region_propagate": ("region_propagate", region_propagate),
    "connected_components": ("connected_components", connected_components),
    "pseudo_label": ("pseudo_label", pseudo_label),
    "cross_entropy": ("pixel_loss", cross_entropy),
    "divergence": ("pixel_loss", divergence),
}
DIFFERENTIABLE = (
    "pixel_propagate", "pixel_propagate_thresholded", "pixel_propagate_gated", "correlation_rows", "cross_entropy",
    "divergence",
)  # fmt: skip


def results(found) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def with_gradients(call, arguments) -> list[Tensor]:
    """Results, and the gradients of every floating map, which come first."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() and x.dim() == 4 else x for x in arguments]
    found = call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.square().sum(), wanted)]
