"""Colours, blur and flips on the device, compared with torchvision's functions of one image."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from corrmatch.data.views import Colour
from corrmatch.methods.parts.photometric import (
    denormalized,
    draw_jitter,
    flip,
    gaussian_blur,
    jitter,
    normalized,
    recolour,
)

FUNCTIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def images():
    """Images with colours in [0, 1]. Some pixels are gray, black or white, and have no hue."""
    x = torch.rand(24, 3, 13, 11)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = 0, 1, 0.3
    return x


def test_jitter_is_torchvisions_in_every_order(images):
    order = torch.tensor(list(itertools.permutations(range(4))))
    factors, _ = draw_jitter((0.9, 0.9, 0.9, 0.5), len(order), seed(int(torch.randint(1000, ()))))
    found = jitter(images, factors, order)
    for x, numbers, kinds, result in zip(images, factors, order, found, strict=True):
        expected = x
        for kind in kinds.tolist():
            expected = FUNCTIONS[kind](expected, numbers[kind].item())
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_one_draw_of_jitter_serves_a_batch(images):
    factors, order = draw_jitter((0.5, 0.5, 0.5, 0.25), 1, seed(0))
    each = jitter(images, factors.expand(24, -1), order.expand(24, -1))
    torch.testing.assert_close(jitter(images, factors, order), each, rtol=0, atol=0)


def test_laws_of_the_draws():
    factors, order = draw_jitter((0.5, 2.0, 0.0, 0.25), 4000, seed(int(torch.randint(1000, ()))))
    for column, (low, high) in zip(factors.T, ((0.5, 1.5), (0, 3), (1, 1), (-0.25, 0.25)), strict=True):
        assert column.min() >= low
        assert column.max() <= high
        assert abs(column.mean() - (low + high) / 2) < 0.1
    first = torch.stack([(order == kind).float().mean(0) for kind in range(4)])
    assert (first - 0.25).abs().max() < 0.05
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(4000, -1))


def test_blur_is_torchvisions(images):
    sigma = torch.linspace(0.15, 1.15, 24)
    found = gaussian_blur(images, sigma, 4)
    for x, deviation, result in zip(images, sigma.tolist(), found, strict=True):
        torch.testing.assert_close(result, tv.gaussian_blur(x, 9, deviation), rtol=0, atol=1e-5)


def test_normalisation_and_back(images):
    assert denormalized(normalized(images)).sub(images).abs().max() < 1e-6


def test_nothing_drawn_leaves_the_images(images):
    images = normalized(images)
    torch.testing.assert_close(recolour(images, Colour(chance=0, gray=0, blur=0), seed(0)), images, rtol=0, atol=1e-5)
    still = Colour((0, 0, 0, 0), chance=1, gray=0, blur=0)
    torch.testing.assert_close(recolour(images, still, seed(0)), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("once", ["nothing", "chances", "everything"])
def test_what_is_drawn_once(once):
    """One draw for the batch keeps equal images equal; a draw for each image does not."""
    images = normalized(torch.rand(1, 3, 9, 9)).expand(16, -1, -1, -1)
    for colour in (Colour((0.5, 0.5, 0.5, 0.25), 0.5, 0, 0), Colour(chance=0, gray=0, blur=0.5, sigma=(0.5, 2))):
        changed, equal = set(), set()
        for number in range(20):
            x = recolour(images, colour, seed(number), once=once)
            moved = (x - images).abs().amax((1, 2, 3)) > 1e-3
            changed.add(moved.sum().item())
            if moved.any():
                equal.add((x[moved] - x[moved][:1]).abs().max().item() < 1e-6)
        assert (changed <= {0, 16}) == (once != "nothing")
        assert changed >= {0, 16} or once == "nothing"
        assert equal == {once == "everything"}


def test_gray_images_and_unknown_draws():
    images = normalized(torch.rand(8, 3, 9, 9))
    gray = denormalized(recolour(images, Colour(chance=0, gray=1, blur=0), seed(0)))
    torch.testing.assert_close(gray, tv.rgb_to_grayscale(denormalized(images), 3), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="once: expected one of nothing, chances, everything, got 'both'"):
        recolour(images, Colour(), seed(0), once="both")


def test_half_precision_and_gradients(images):
    images = normalized(images).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        x = recolour(images, Colour(), seed(0))
    assert x.dtype == torch.float32
    assert not x.requires_grad


def test_flips_take_everything_along():
    images, labels = torch.rand(64, 3, 5, 7), torch.randint(9, (64, 5, 7))
    flipped, along = flip(seed(int(torch.randint(1000, ()))), images, labels)
    mirrored = (flipped != images).flatten(1).any(1)
    assert 10 < mirrored.sum() < 54
    assert torch.equal(flipped[mirrored], images[mirrored].flip(-1))
    assert torch.equal(along[mirrored], labels[mirrored].flip(-1))
    assert torch.equal(along[~mirrored], labels[~mirrored])
    assert torch.equal(flip(seed(0), images, chance=1)[0], images.flip(-1))
