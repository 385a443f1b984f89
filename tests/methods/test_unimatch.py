"""UniMatch: two recorded steps of the published loop."""

from __future__ import annotations

import pytest
import torch
from recordings import Recorded, load, method_of, progress, recorded, relative, weak_to_strong

from corrmatch.models.network import Prediction


@recorded("unimatch_step_*")
@pytest.mark.parametrize("step", ["t0_", "t1_"])
def test_recorded_steps(path, step):
    at = load(path, step)
    leaves = {name: at[f"logits_{name}"].requires_grad_() for name in ("xw", "xw_fp", "s12")}
    network = Recorded(at["logits_mix"], Prediction(leaves["xw"], leaves["xw_fp"]), leaves["s12"])
    method = method_of("unimatch", 5, network)
    loss, scalars = method(weak_to_strong(at, 2), progress())
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-5)
    found = {"x": scalars["x"], "s": (scalars["s1"] + scalars["s2"]) / 2, "fp": scalars["fp"]}
    for name, value in found.items():
        assert value.item() == pytest.approx(at[f"loss_{name}"].item(), rel=1e-5)
    assert scalars["reliable"].item() == pytest.approx(at["mask_ratio"].item(), rel=1e-5)
    for name, leaf in leaves.items():
        assert relative(leaf.grad, at[f"grad_{name}"]) < 1e-4
    assert [mode for _, mode in network.given] == [False, True, True]
    for (images, _), name in zip(network.given, ("mix", "xw", "s12"), strict=True):
        assert torch.equal(images, at[f"in_{name}"])
