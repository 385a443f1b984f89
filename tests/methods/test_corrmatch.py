"""CorrMatch: two recorded training steps of the published implementation, and updates of the threshold."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from test_golden import FILES, load, relative, unpack

from corrmatch import RegionMasks, nn
from corrmatch.config import PropagationConfig
from corrmatch.data.datasets import IGNORE
from corrmatch.methods.corrmatch import make_targets, terms, total
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.methods.parts.threshold import StepThreshold
from corrmatch.models.network import Prediction

STEPS = [name for name in FILES if name.startswith("step")]
PRINTED = {"Total loss": "total", "Loss x": "x", "loss_corr_ce": "x_corr", "Loss s": "s", "Loss w_fp": "fp",
           "loss_corr_u": "corr"}  # fmt: skip
PROPAGATION = Propagation(PropagationConfig(head=True, regions=True))
LEAVES = ("out_w", "fp_w", "corr_w", "out_s", "corr_s")


def run_step(at, theta):
    """The recorded outputs as leaves, the targets, the terms and the total of one recorded step."""
    leaves = {name: at[name].float().requires_grad_() for name in LEAVES}
    out, perturbed, propagated, strong, strong_propagated = leaves.values()
    images, truth = at["ignore"].shape[0], at["mask_x"]
    mix = PseudoLabels.of(at["out_mix"].float(), at["ignore_mix"] == IGNORE)
    masks = RegionMasks.from_bool(unpack(at, "masks")[images:])
    ignore, box = at["ignore"] == IGNORE, at["cutmix"] == 1
    targets = make_targets(out[images:], mix, ignore, box, masks, theta, PROPAGATION)
    weak = Prediction(out, perturbed)
    parts = terms(weak, Prediction(strong), (propagated, strong_propagated), targets, truth)
    return leaves, targets, parts, total(parts)


@pytest.mark.parametrize("name", STEPS)
def test_recorded_steps(name):
    vectors = load(name)
    theta = nn.DynamicThreshold(0.85 if "voc" in name else 0.6)
    history = []
    for step in ("t0_", "t1_"):
        at = {key.removeprefix(step): value for key, value in vectors.items() if key.startswith(step)}
        leaves, targets, parts, loss = run_step(at, theta)
        assert parts["x"].item() == pytest.approx(at["loss_x"].item(), rel=1e-5)
        assert parts["x_corr"].item() == pytest.approx(at["loss_x_corr"].item(), rel=1e-5)
        assert theta.threshold.item() == pytest.approx(at["threshold"].item(), abs=1e-6)
        assert torch.equal(targets.weak.labels, at["labels_weak"].long())
        assert torch.equal(targets.labels, at["labels_after"].long())
        loss.backward()
        for recorded, leaf in leaves.items():
            assert relative(leaf.grad, at[f"grad_{recorded}"]) < 1e-4, recorded

        history.append({n: part.item() for n, part in (parts | {"total": loss}).items()})
        means = {n: np.mean([past[n] for past in history]) for n in history[0]}
        printed = printed_losses(name, step)
        assert {n: round(means[n], 3) for n in printed} == pytest.approx(printed, abs=1.01e-3)
    assert len(history) == 2


def printed_losses(name, step):
    """The running means that the published implementation printed, to three decimals."""
    with np.load(FILES[name]) as file:
        found = re.findall(r"([A-Za-z_]+(?: [a-z_]+)?): ([\d.]+)", str(file[f"{step}printed"]))
    return {PRINTED[term]: float(value) for term, value in found if term in PRINTED}


def test_the_threshold_sees_weak_logits_outside_the_mixed_padding():
    """Three pixels of a class: in the pasted image's padding, in that of the weak one under the box, in neither."""
    confidence = torch.tensor([0.99, 0.95, 0.9])
    logits = torch.stack([confidence, 1 - confidence]).log().view(1, 2, 1, 3)
    box, weak_padding, mix_padding = (torch.tensor(x).bool().view(1, 1, 3) for x in ([1, 1, 0], [0, 1, 0], [1, 0, 0]))
    mix = PseudoLabels(torch.zeros(1, 1, 3, dtype=torch.long), torch.zeros(1, 1, 3), mix_padding)
    masks = RegionMasks.from_bool(torch.zeros(1, 1, 1, 3, dtype=torch.bool))
    theta = nn.DynamicThreshold(0.5, momentum=0.0)
    targets = make_targets(logits, mix, weak_padding, box, masks, theta, PROPAGATION)
    assert theta.threshold.item() == pytest.approx(0.95)
    assert targets.counted.flatten().tolist() == [False, True, True]
    assert targets.weak.counted.flatten().tolist() == [True, False, True]
    assert targets.weak_reliable.flatten().tolist() == [True, False, False]
    assert not targets.reliable_before.any()


def test_the_threshold_moves_once_a_step_of_several_batches():
    """The update is that of one large batch. The next step continues as without batches."""
    peaks = torch.rand(3, 4)
    whole, parts = nn.DynamicThreshold(0.5, 0.9), StepThreshold(4, 0.5, 0.9)
    for _ in range(2):
        expected = whole.update(peaks.max(0).values).item()
        for peak in peaks:
            moved = parts.update(peak).item()
        parts.finish_step()
        assert moved == pytest.approx(expected, rel=1e-6)
