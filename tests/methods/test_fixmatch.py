"""FixMatch: two recorded steps of each published form, and its options."""

from __future__ import annotations

import pytest
import torch
from recordings import Recorded, load, method_of, progress, recorded, relative, weak_to_strong

STEPS = ["t0_", "t1_"]


@recorded("fixmatch_step_*")
@pytest.mark.parametrize("step", STEPS)
def test_recorded_steps(path, step):
    at = load(path, step)
    leaves = {name: at[f"logits_{name}"].requires_grad_() for name in ("xw", "s")}
    network = Recorded(at["logits_mix"], leaves["xw"], leaves["s"])
    method = method_of("fixmatch", 5, network)
    loss, scalars = method(weak_to_strong(at, 1), progress())
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    for name in ("x", "s"):
        assert scalars[name].item() == pytest.approx(at[f"loss_{name}"].item(), rel=1e-5)
    assert scalars["reliable"].item() == pytest.approx(at["mask_ratio"].item(), rel=1e-5)
    for name, leaf in leaves.items():
        assert relative(leaf.grad, at[f"grad_{name}"]) < 1e-4
    assert [mode for _, mode in network.given] == [False, True, True]
    for (images, _), name in zip(network.given, ("mix", "xw", "s"), strict=True):
        assert torch.equal(images, at[f"in_{name}"])


@recorded("fixmatch_v2_step_*")
@pytest.mark.parametrize("step", STEPS)
def test_recorded_steps_of_the_second_form(path, step):
    at = load(path, step)
    leaf = at["logits_xs"].requires_grad_()
    network = Recorded(leaf)
    method = method_of("fixmatch", 5, network, teacher="eval", partner="batch")
    method.teacher.network = Recorded(at["logits_w"])
    batch = weak_to_strong(at, 1)
    assert method.streams().keys() == {"labeled", "unlabeled"}
    loss, scalars = method.train()(batch, progress())
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    for name in ("x", "s"):
        assert scalars[name].item() == pytest.approx(at[f"loss_{name}"].item(), rel=1e-5)
    assert scalars["reliable"].item() == pytest.approx(at["mask_ratio"].item(), rel=1e-5)
    assert relative(leaf.grad, at["grad_xs"]) < 1e-4
    assert torch.equal(network.given[0][0], at["in_xs"])
    ((given, training),) = method.teacher.network.given
    assert torch.equal(given, at["in_w"])
    assert not training


def test_the_averaged_network_follows_from_a_copy():
    network = torch.nn.Conv2d(1, 1, 1)
    method = method_of("fixmatch", 2, network, teacher="eval", decay=0.9)
    averaged = method.evaluated["teacher"]
    history = []
    for step in range(3):
        with torch.no_grad():
            network.weight.fill_(float(step + 1))
        method.after_step(progress(step))
        history.append(averaged.weight.item())
    assert history == pytest.approx([1.0, 1.5, 2.0])  # the mean of the steps so far, until that is longer than 0.9
