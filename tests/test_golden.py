"""Recorded inputs and outputs of the published implementation.

Small vectors are in tests/data. Larger ones are read from the folder CORRMATCH_GOLDEN, by default ../shared/golden
outside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import targets

from corrmatch import RegionMasks, nn, ops

OP = "pixel_propagate"
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / "tests/data", Path(os.environ.get("CORRMATCH_GOLDEN", ROOT.parent / "shared/golden"))]
FILES = {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.npz"))}
SMALL = {"corr_9x9_s11", "corr_11x7_s11", "corr_12x10_ratio_s11", "step_small_s11"}


def load(name):
    with np.load(FILES[name]) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}


def unpack(vectors, name):
    shape = tuple(vectors[f"{name}_shape"].tolist())
    bits = np.unpackbits(vectors[f"{name}_packed"].numpy(), axis=-1, count=shape[-1])
    return torch.from_numpy(bits.astype(bool).reshape(shape))


def relative(actual, expected):
    return ((actual.double().cpu() - expected.double()).norm() / expected.double().norm()).item()


def test_small_vectors_are_here():
    assert {path.stem for path in FOLDERS[0].glob("*.npz")} >= SMALL


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("corr")])
def test_pixel_propagation(backend, name):
    vectors = load(name)
    names = ["feature", "conv1_weight", "conv1_bias", "conv2_weight", "conv2_bias"]
    leaves = [vectors[n].to(backend.device).requires_grad_() for n in names]
    feature, weight1, bias1, weight2, bias2 = leaves
    query, key = F.conv2d(feature, weight1, bias1), F.conv2d(feature, weight2, bias2)
    assert relative(query.detach(), vectors["query"]) < 1e-6
    assert relative(key.detach(), vectors["key"]) < 1e-6
    logits = vectors["logits"].float().to(backend.device)
    value = F.interpolate(logits, size=feature.shape[2:], mode="bilinear", align_corners=True)

    z = ops.pixel_propagate(query, key, value, backend=backend.name)
    assert relative(z.detach(), vectors["propagated"]) < 1e-5
    z.backward(vectors["grad_output"].to(backend.device))
    for n, leaf in zip(names[:-1], leaves, strict=False):
        assert relative(leaf.grad, vectors[f"grad_{n}"]) < 1e-5, n
    # A bias of all keys shifts every row of scores by a constant: its gradient is 0 and what was recorded is rounding.
    assert bias2.grad.norm() < 1e-5 * vectors["grad_conv1_bias"].norm()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("corr")])
def test_region_masks(backend, name):
    vectors = load(name)
    expected = unpack(vectors, "region_masks")
    maps = (vectors[n].to(backend.device) for n in ("query", "key", "sample_index"))
    found = ops.region_masks(*maps, tuple(vectors["logits"].shape[2:]), backend=backend.name)
    assert (found.to_bool().cpu() != expected).float().mean() <= 1e-4


test_region_masks.op = "region_masks"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("step")])
def test_training_steps(backend, name):
    """Results of the ops in two steps: labels, threshold, and labels and reliability after region propagation."""
    vectors = load(name)
    theta = nn.DynamicThreshold(0.85 if "voc" in name else 0.6).to(backend.device)
    labeller = backend.name if backend.name in {target.name for target in targets("pseudo_label")} else None
    for step in ("t0_", "t1_"):
        at = {k.removeprefix(step): v for k, v in vectors.items() if k.startswith(step)}
        images, classes = at["ignore"].shape[0], at["out_w"].shape[1]
        box = at["cutmix"] == 1
        ignore = torch.where(box, at["ignore_mix"], at["ignore"]) == 255

        weak = at["out_w"][images:].float().to(backend.device)
        labels, confidence, peak = ops.pseudo_label(weak, ignore=ignore.to(backend.device), backend=labeller)
        mix_labels, mix_confidence, _ = ops.pseudo_label(at["out_mix"].float().to(backend.device), backend=labeller)
        assert torch.equal(labels.cpu(), at["labels_weak"].long())
        threshold = theta.update(peak)
        assert abs(threshold.item() - at["threshold"].item()) < 1e-6

        box, ignore = box.to(backend.device), ignore.to(backend.device)
        labels = torch.where(box, mix_labels, labels)
        assert torch.equal(labels.cpu(), at["labels_cutmixed"].long())
        reliable = (torch.where(box, mix_confidence, confidence) >= threshold) & ~ignore
        masks = RegionMasks.from_bool(unpack(at, "masks")[images:].to(backend.device))
        after, reliable_after = ops.region_propagate(
            labels, reliable, masks, threshold, num_classes=classes, valid=~box & ~ignore, backend=backend.name
        )
        assert torch.equal(after.cpu(), at["labels_after"].long())
        assert not torch.equal(after, labels)
        # The strong view gets a gradient only where its pixels are reliable after region propagation.
        for gradient in ("grad_out_s", "grad_corr_s"):
            assert torch.equal(reliable_after.cpu(), at[gradient].abs().sum(1) > 0)


test_training_steps.op = "region_propagate"
