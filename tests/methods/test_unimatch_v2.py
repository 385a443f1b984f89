"""UniMatch V2: two recorded steps of the published loop, and three whole steps with its network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recordings import Recorded, load, method_of, progress, recorded, relative, weak_to_strong
from timm.models.vision_transformer import VisionTransformer

from corrmatch.config import TrainConfig
from corrmatch.methods import unimatch_v2
from corrmatch.methods.unimatch_v2 import complementary, complementary_dropout
from corrmatch.models.dpt import DPT
from corrmatch.models.network import enlarge
from corrmatch.training.optimization import make_optimizer

STEPS = 8  # of the recorded run's schedule


@recorded("unimatch_v2_step_*")
@pytest.mark.parametrize("step", ["t0_", "t1_"])
def test_recorded_steps(path, step):
    at = load(path, step)
    leaves = {name: at[f"logits_{name}"].requires_grad_() for name in ("x", "s12")}
    network = Recorded(leaves["x"], leaves["s12"])
    network.widths = (12,)
    method = method_of("unimatch_v2", 5, network)
    method.teacher.network = Recorded(at["logits_w"])
    loss, scalars = method.train()(weak_to_strong(at, 2), progress())
    loss.backward()
    assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-6)
    found = {"x": scalars["x"], "s": (scalars["s1"] + scalars["s2"]) / 2}
    for name, value in found.items():
        assert value.item() == pytest.approx(at[f"loss_{name}"].item(), rel=1e-6)
    assert scalars["reliable"].item() == pytest.approx(at["mask_ratio"].item(), rel=1e-6)
    for name, leaf in leaves.items():
        assert relative(leaf.grad, at[f"grad_{name}"]) < 1e-5
        given, training = network.given[list(leaves).index(name)]
        assert training
        assert torch.equal(given, at[f"in_{name}"])
    ((given, training),) = method.teacher.network.given
    assert torch.equal(given, at["in_w"])
    assert not training


def ours(name):
    """The name of a parameter of the published network in this package."""
    if name.startswith("backbone."):
        return name
    name = name.removeprefix("head.").removeprefix("scratch.")
    parts = name.split(".")
    if parts[0] == "projects":
        parts[0] = "project"
    elif parts[0] == "resize_layers":
        parts[0] = "resize"
    elif parts[0].endswith("_rn"):
        parts[:1] = ["reduce", str(int(parts[0][5]) - 1)]
    elif parts[0].startswith("refinenet"):
        inner = {"out_conv": ["mix"], "resConfUnit1": ["before"], "resConfUnit2": ["after"]}[parts[1]]
        layer = [{"conv1": "first", "conv2": "second"}.get(x, x) for x in parts[2:]]
        parts = ["fuse", str(int(parts[0][9]) - 1), *inner, *layer]
    elif parts[0] == "output_conv":
        parts[0] = "decode"
    return ".".join(parts)


class Net:
    """A recording of whole steps, with its vectors by the names of the parameters in this package."""

    def __init__(self, path):
        with np.load(path) as file:
            self.names = [ours(str(name)) for name in file["names"]]
            self.shapes = [[int(n) for n in str(shape).split(",")] for shape in file["shapes"]]
            self.vectors = {
                key: torch.from_numpy(file[key]) for key in file.files if file[key].shape == file["w0"].shape
            }

    def __getitem__(self, key):
        parts = self.vectors[key].split([int(np.prod(shape)) for shape in self.shapes])
        return {name: x.view(shape) for name, shape, x in zip(self.names, self.shapes, parts, strict=True)}


@recorded("unimatch_v2_net_*")
def test_recorded_network(path, monkeypatch):
    """Loss, logits, gradients and weights of three steps, and the averaged network after them."""
    net, torch_file = Net(path), load(path)
    vit = VisionTransformer(
        img_size=42, patch_size=14, embed_dim=12, depth=4, num_heads=2, init_values=1.0, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    network = DPT(vit, 5, channels=8, levels=(6, 8, 10, 12), correlation=False)
    state = net["w0"]
    # The mask token and a unit without a second input take no part: they are not here, and got no gradient there.
    idle = [name for name in state if name not in dict(network.named_parameters())]
    assert idle[0] == "backbone.mask_token"
    assert all(name.startswith("fuse.3.before.") for name in idle[1:])
    assert all(net["t0_grad"][name].isnan().all() for name in idle)
    network.load_state_dict({name: x for name, x in state.items() if name not in idle})
    method = method_of("unimatch_v2", 5, network, threshold=0.22)
    groups = method.parameter_groups(TrainConfig(lr=1e-4, lr_multi=40))
    optimizer = make_optimizer(groups, TrainConfig(optimizer="adamw", weight_decay=0.01))
    first = [group["lr"] for group in optimizer.param_groups]
    said = []
    for each in (network, method.teacher.network):
        each.register_forward_hook(lambda _, inputs, out: said.append(enlarge(out.logits, inputs[0].shape[2:])))
    for step in range(3):
        at = {name.removeprefix(f"t{step}_"): x for name, x in torch_file.items() if name.startswith(f"t{step}_")}
        factors = complementary(at["drop1"], at["perm"])
        monkeypatch.setattr(unimatch_v2, "complementary_dropout", lambda *_, factors=factors: [factors])
        said.clear()
        method.train()
        loss, scalars = method(weak_to_strong(at, 2), progress(step))
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(at["loss"].item(), rel=1e-6)
        assert scalars["x"].item() == pytest.approx(at["loss_x"].item(), rel=1e-6)
        assert ((scalars["s1"] + scalars["s2"]) / 2).item() == pytest.approx(at["loss_s"].item(), rel=1e-6)
        assert scalars["reliable"].item() == pytest.approx(at["mask_ratio"].item(), rel=1e-6)
        for logits, name in zip(said, ("w", "x", "s12"), strict=True):
            assert relative(logits.detach(), at[f"logits_{name}"]) < 1e-6
        gradients, expected = dict(network.named_parameters()), net[f"t{step}_grad"]
        norm = torch.cat([expected[name].flatten() for name in gradients]).norm()
        difference = torch.cat([(p.grad - expected[name]).flatten() for name, p in gradients.items()]).norm()
        assert difference / norm < 1e-5
        optimizer.step()
        for group, lr in zip(optimizer.param_groups, first, strict=True):  # the published rates are a step late
            group["lr"] = lr * (1 - step / STEPS) ** 0.9
        method.finish_step(progress(step))
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.detach(), net[f"t{step}_w"][name], rtol=0, atol=1e-5)
    for name, p in method.teacher.network.named_parameters():
        torch.testing.assert_close(p, net["ema_final"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_every_channel_is_kept_by_one_view_and_half_of_the_images_go_without(images):
    factors = complementary_dropout(images, (8, 2000), torch.device("cpu"))
    for width, both in zip((8, 2000), factors, strict=True):
        assert both.shape == (2 * images, width)
        first, second = both.chunk(2)
        assert torch.equal(first + second, torch.full_like(first, 2))
        spared = (first == 1).all(1)
        assert spared.sum() == images // 2
        assert set(first[~spared].unique().tolist()) <= {0.0, 2.0}
        if width == 2000:
            assert (first[~spared] == 2).float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal((factors[0] == 1).all(1), (factors[1] == 1).all(1))  # of the same images


def test_one_mask_for_all_features_of_a_transformer():
    """The result is that of multiplying each map after its norm layer. The correlation head has no dropout."""
    network = DPT("test_vit", 5).eval()
    images, (factor,) = torch.randn(4, 3, 48, 64), complementary_dropout(2, network.widths, torch.device("cpu"))
    out, plain = network(images, factors=[factor], correlate=True), network(images, correlate=True)
    scaled = [x * factor[:, :, None, None] for x in network.features(images)]
    torch.testing.assert_close(out.logits, network.segment(*scaled), rtol=0, atol=0)
    torch.testing.assert_close(out.query, plain.query, rtol=0, atol=0)
    assert (out.logits - plain.logits).abs().max() > 0.01


def test_what_is_evaluated():
    method = method_of("unimatch_v2", 5, Recorded())
    assert method.streams().keys() == {"labeled", "unlabeled"}
    assert list(method.evaluated) == ["teacher", "student"]
    assert method.score_all
