"""Mixing on the device."""

from __future__ import annotations

import torch

from corrmatch.methods.parts.mixing import class_mix


def test_half_of_the_classes_that_occur_are_drawn():
    labels = torch.randint(2, 7, (4, 9, 11))
    labels[0] = 5  # one class: half of it is none
    labels[1, :4], labels[1, 4:] = 2, 6
    drawn = []
    for seed in range(40):
        mask = class_mix(labels, 8, torch.Generator().manual_seed(seed))
        for image, inside in zip(labels, mask, strict=True):
            chosen = set(image[inside].tolist())
            assert not chosen & set(image[~inside].tolist())  # whole classes
            assert len(chosen) == len(image.unique()) // 2
        drawn.append(tuple(sorted(set(labels[1][mask[1]].tolist()))))
    assert set(drawn) == {(2,), (6,)}


def test_the_generator_decides():
    labels = torch.randint(0, 6, (2, 9, 9))
    first, again, other = (class_mix(labels, 6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
