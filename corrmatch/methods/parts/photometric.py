"""Colours, blur and flips of batches on the device, drawn from the generator of the step.

These views are made during the step, because they apply to images that were mixed in it. Images (B, 3, H, W) are
normalised; the changes are applied to colours in [0, 1]. Nothing waits for the device: constants are Python numbers,
because copying a tensor to the device would wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from corrmatch.data.views import DEVIATION, MEAN, Colour

ONCE = ("nothing", "chances", "everything")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)


def recolour(images: Tensor, colour: Colour, generator: torch.Generator, *, once: str = "nothing") -> Tensor:
    """Jitter, gray and blur as in `data.views.Colour`, without gradient.

    Args:
        images: (B, 3, H, W), normalised.
        colour: The law of the changes. The kernel of a blur is as wide as the largest sigma requires.
        generator: For the draws, on the device of the images.
        once: What is drawn once for the whole batch: "nothing", "chances" (whether a change is made, not its amount),
            or "everything".
    """
    if once not in ONCE:
        raise ValueError(f"once: expected one of {', '.join(ONCE)}, got {once!r}")
    chances = 1 if once != "nothing" else images.shape[0]
    amounts = 1 if once == "everything" else images.shape[0]

    def where(chance: float, changed: Tensor, x: Tensor) -> Tensor:
        return torch.where(_drawn(chance, chances, generator).view(-1, 1, 1, 1), changed, x)

    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        x = denormalized(images)
        if colour.chance > 0:
            x = where(colour.chance, jitter(x, *draw_jitter(colour.jitter, amounts, generator)), x)
        if colour.gray > 0:
            x = where(colour.gray, luma(x).expand_as(x), x)
        if colour.blur > 0:
            low, high = colour.sigma
            sigma = low + (high - low) * torch.rand(amounts, generator=generator, device=x.device)
            x = where(colour.blur, gaussian_blur(x, sigma, math.ceil(3 * high)), x)
        return normalized(x)


def flip(generator: torch.Generator, *maps: Tensor, chance: float = 0.5) -> tuple[Tensor, ...]:
    """Flips images (B, ..., W) left to right, each with its own draw, and further tensors along with them."""
    mirrored = _drawn(chance, maps[0].shape[0], generator)
    return tuple(torch.where(mirrored.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x) for x in maps)


def normalized(x: Tensor) -> Tensor:
    """Colours in [0, 1] as normalised images, the input of networks."""
    return torch.stack(
        [(c - mean) / deviation for c, mean, deviation in zip(x.unbind(1), MEAN, DEVIATION, strict=True)], 1
    )


def denormalized(images: Tensor) -> Tensor:
    """The inverse of `normalized`, clamped to [0, 1]."""
    channels = zip(images.float().unbind(1), MEAN, DEVIATION, strict=True)
    return torch.stack([c * deviation + mean for c, mean, deviation in channels], 1).clamp(0, 1)


def draw_jitter(strengths: Sequence[float], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors and orders (count, 4) for `jitter`, by the law of torchvision's ColorJitter.

    Brightness, contrast and saturation are uniform in [max(0, 1 - s), 1 + s], the hue in [-s, s]. All orders
    are equally likely.
    """
    share = torch.rand(count, 4, generator=generator, device=generator.device)
    ends = [(max(0.0, 1 - s), 1 + s) for s in strengths[:HUE]] + [(-strengths[HUE], strengths[HUE])]
    factors = torch.stack([low + (high - low) * x for x, (low, high) in zip(share.unbind(1), ends, strict=True)], 1)
    return factors, torch.rand(count, 4, generator=generator, device=generator.device).argsort(1)


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue, as torchvision's functions of these names do.

    Args:
        x: (B, 3, H, W), colours in [0, 1].
        factors: (B, 4) or (1, 4), of the four in this order; hue in [-0.5, 0.5], a share of the circle.
        order: As factors: which of them comes first, second, third, last.
    """
    # Brightness, contrast and saturation blend the image with another one. The change of hue is expensive, so it is
    # done once for the batch, after the blends that precede it and before the others. A factor of 1 skips a blend.
    turned = order == HUE
    place = turned.int().argmax(1)
    blends = order.gather(1, turned.int().argsort(dim=1, stable=True))[:, :HUE]
    for before in (True, False):
        for k in range(HUE):
            kind = blends[:, k : k + 1]
            due = ((k < place) == before).unsqueeze(1)
            x = _blend(x, kind, torch.where(due, factors.gather(1, kind), 1.0))
        if before:
            x = turn_hue(x, factors[:, HUE])
    return x


def luma(x: Tensor) -> Tensor:
    """The gray image (B, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotates the hue by shares (B,) or (1,) of the circle. Largest and smallest channel of a pixel are kept."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = high - low
    red, green, blue = (x / torch.where(spread > 0, spread, 1)).split(1, 1)
    sector = torch.where(x[:, 1:2] == high, blue - red + 2, red - green + 4)
    sector = torch.where(x[:, :1] == high, green - blue, sector) + 6 * turn.view(-1, 1, 1, 1)
    angle = torch.cat([sector + 5, sector + 3, sector + 1], 1) % 6
    return high - spread * torch.minimum(angle, 4 - angle).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blurs images (B, 3, H, W) with deviations (B,) or (1,), 2 radius + 1 taps and a mirrored border."""
    count, channels = x.shape[:2]
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offsets / sigma.view(-1, 1)).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).expand(count, -1).repeat_interleave(channels, 0)
    padded = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
    rows = F.conv2d(padded, kernel[:, None, :, None], groups=count * channels)
    return F.conv2d(rows, kernel[:, None, None, :], groups=count * channels).view_as(x)


def _blend(x: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    gray, kind = luma(x), kind.view(-1, 1, 1, 1)
    other = torch.where(kind == CONTRAST, gray.mean((2, 3), keepdim=True), torch.where(kind == SATURATION, gray, 0))
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _drawn(chance: float, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device) < chance
