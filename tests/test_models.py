"""DeepLabV3+ over timm backbones."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from corrmatch.config import ConfigError, load_config
from corrmatch.models.deeplab import DeepLabV3Plus, second_branch
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import enlarge, evaluating, without_dropout
from corrmatch.nn import propagate_logits

SMALL = {"output_stride": 16, "channels": 16}


def test_published_architecture():
    model = DeepLabV3Plus("resnet101", 21)
    assert model.backbone.feature_info.reduction()[-1] == 8
    atrous = [branch[0] for branch in model.pyramid.branches]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.dilation[0]) for c in atrous] == [
        (2048, 256, 1, 1), (2048, 256, 3, 12), (2048, 256, 3, 24), (2048, 256, 3, 36)
    ]  # fmt: skip
    assert (model.pyramid.fuse[0].in_channels, model.reduce[0].in_channels, model.reduce[0].out_channels) == (
        1280,
        256,
        48,
    )
    assert model.correlation.project[0].in_channels == 2048
    backbone = timm.create_model("resnet101", num_classes=0)
    assert model.backbone.state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv3_small_100"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_shapes(backbone, output_stride):
    model = DeepLabV3Plus(backbone, 5, channels=16, output_stride=output_stride)
    images = torch.randn(2, 3, 65, 97)
    low, high = model.features(images)
    assert tuple(low.shape[2:]) == (17, 25)
    assert tuple(high.shape[2:]) == {8: (9, 13), 16: (5, 7)}[output_stride]
    out = model(images, perturb=True, correlate=True)
    for logits in (out.logits, out.perturbed):
        assert tuple(logits.shape) == (2, 5, 17, 25)
    assert out.query.shape == out.key.shape == (2, 5, *high.shape[2:])


def test_only_what_is_asked_for():
    model = DeepLabV3Plus("resnet10t", 5, **SMALL).eval()
    images = torch.randn(1, 3, 33, 33)
    plain, all_of_it = model(images), model(images, perturb=True, correlate=True)
    assert all(x is None for x in plain[1:])
    torch.testing.assert_close(plain.logits, all_of_it.logits)
    torch.testing.assert_close(all_of_it.perturbed, plain.logits)  # no dropout in evaluation
    without = DeepLabV3Plus("resnet10t", 5, correlation=False, **SMALL)
    assert without(images.expand(2, -1, -1, -1), correlate=True).query is None


def test_perturbed_logits_differ_in_training_and_reach_the_backbone():
    model = DeepLabV3Plus("resnet10t", 5, **SMALL)
    out = model(torch.randn(2, 3, 33, 33), perturb=True)
    assert (out.perturbed - out.logits).abs().mean() > 0.1 * out.logits.std()
    out.perturbed.sum().backward()
    assert model.backbone.conv1[0].weight.grad.abs().sum() > 0


def test_both_levels_are_perturbed():
    model = DeepLabV3Plus("resnet10t", 5, **SMALL).eval()
    images = torch.randn(1, 3, 33, 33)
    low, high = model.features(images)
    model.perturb = Plus(1.0)
    torch.testing.assert_close(model(images, perturb=True).perturbed, model.segment(low + 1, high + 1))


class Plus(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, features):
        return features + self.x


def test_propagated_logits_train_the_head_and_not_the_logits():
    model = DeepLabV3Plus("resnet10t", 5, **SMALL)
    out = model(torch.randn(2, 3, 33, 33), correlate=True)
    propagate_logits(out.query, out.key, out.logits).square().sum().backward()
    assert model.correlation.query.weight.grad.abs().sum() > 0
    assert model.backbone.conv1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.decode.parameters())


def test_a_prediction_is_split_between_images():
    model = DeepLabV3Plus("resnet10t", 5, **SMALL).eval()
    out = model(torch.randn(3, 3, 33, 33), correlate=True, features=True, fused=True)
    torch.testing.assert_close(model.classifier(out.features), out.logits)
    torch.testing.assert_close(model.decode(out.fused), out.logits)
    first, rest = out.split(1)
    assert first.perturbed is rest.perturbed is None
    for whole, *parts in zip(out, first, rest, strict=True):
        if whole is not None:
            torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_modes_come_back():
    """Afterwards all parts are in their former modes, including frozen ones."""
    model = DeepLabV3Plus("resnet10t", 5, **SMALL).train()
    model.backbone.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert model.decode.training
    assert not any(module.training for module in model.backbone.modules())


@pytest.mark.parametrize(("size", "padded"), [((16, 17), (17, 17)), ((33, 34), (33, 49)), ((1, 50), (1, 65))])
def test_images_are_padded_so_that_features_reach_the_corners(size, padded):
    model, images, seen = DeepLabV3Plus("resnet10t", 5, **SMALL).eval(), torch.randn(1, 3, *size), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model.whole(images)
    assert seen[0].shape[2:] == padded
    assert torch.equal(seen[0][:, :, : size[0], : size[1]], images)
    assert torch.equal(logits, enlarge(model(seen[0]).logits, padded)[:, :, : size[0], : size[1]])


@pytest.mark.parametrize(("old", "new"), [((9, 13), (65, 97)), ((5, 4), (31, 17)), ((1, 3), (4, 4)), ((6, 6), (6, 6))])
def test_enlargement_is_that_of_torch(old, new):
    x = torch.randn(2, 3, *old, requires_grad=True)
    ours, theirs = enlarge(x, new), F.interpolate(x, new, mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (ours, theirs)))


def test_enlargement_is_in_float32():
    x = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        large = enlarge(x, (9, 9))
    torch.testing.assert_close(large, F.interpolate(x.float(), (9, 9), mode="bilinear", align_corners=True))


def test_weights_from_a_file(tmp_path):
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = DeepLabV3Plus("resnet10t", 5, pretrained=str(tmp_path / "weights.pth"), **SMALL)
    assert torch.equal(model.backbone.conv1[0].weight, source.conv1[0].weight)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("resnt18", {}, "did you mean 'resnet18'"),
        ("resnet18", {"pretrained": "missing.pth"}, "pretrained: no weights of resnet18 from missing.pth"),
        ("vit_tiny_patch16_224", {}, "takes no output stride"),
    ],
)
def test_wrong_backbones_are_explained(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        DeepLabV3Plus(backbone, 5, **options)


def test_broken_weights_are_explained(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no weights of resnet10t from .*other\.pth .*are missing"):
        DeepLabV3Plus("resnet10t", 5, pretrained=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet10t", "mobilenetv3_small_100", "tf_efficientnet_lite0"])
def test_a_second_branch_goes_on_where_the_first_one_is_shared(backbone):
    first, second = (DeepLabV3Plus(backbone, classes, **SMALL).eval() for classes in (5, 7))
    whole = sum(p.numel() for p in second.backbone.parameters())
    second = second_branch(first, second)
    images = torch.randn(2, 3, 49, 65)
    low, high = first.features(images)
    found = second.features(low)
    assert torch.equal(found[0], low)
    assert torch.equal(found[1], high)  # a copy
    assert 0 < sum(p.numel() for p in second.backbone.parameters()) < whole
    assert torch.equal(first(images, low=True).low, low)
    assert second(low).logits.shape[1] == 7
    assert second.correlation is None
    with torch.no_grad():
        for p in second.backbone.parameters():
            p.zero_()
    assert torch.equal(first.features(images)[1], high)


def test_multi_grid_and_dropout():
    """At stride 16 the dilations of the last stage's blocks are twice the factors. Dropout changes no key."""
    plain = DeepLabV3Plus("resnet50", 5, **SMALL)
    model = DeepLabV3Plus("resnet50", 5, multi_grid=[1, 2, 4], dropout=(0.5, 0.25, 0.1), **SMALL)
    assert [block.conv2.dilation[0] for block in model.backbone.layer4] == [2, 4, 8]
    assert [block.conv2.dilation[0] for block in plain.backbone.layer4] == [1, 2, 2]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.25, 0.1]
    images = torch.randn(2, 3, 33, 33)
    assert model(images).logits.shape == plain(images).logits.shape == (2, 5, 9, 9)
    assert not torch.equal(model(images).logits, model(images).logits)
    with evaluating(model):
        assert torch.equal(model(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="multi_grid: expected a factor for each of the 3 blocks of the last stage"):
        DeepLabV3Plus("resnet50", 5, multi_grid=[1, 2], **SMALL)
    with pytest.raises(ConfigError, match=r"model\.dropout: expected three chances, got 1"):
        NetworkFactory(load_config("folder", ["data.root=x", "model.dropout=[0.5]"]).model, 5)()


def test_channels_beside_the_colours(tmp_path):
    """The first convolution is new. All other weights are those of the file."""
    given = timm.create_model("resnet18")
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    model = DeepLabV3Plus("resnet18", 1, in_channels=7, pretrained=str(tmp_path / "weights.pth"), **SMALL)
    stem = model.backbone.conv1.weight
    assert stem.shape == (64, 7, 7, 7)
    assert not torch.equal(stem[:, :3], given.conv1.weight)
    assert stem.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)
    for name in ("layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.weight"):
        assert torch.equal(model.backbone.get_parameter(name), given.get_parameter(name))
    assert model(torch.randn(2, 7, 33, 33)).logits.shape == (2, 1, 9, 9)


def test_a_decoder_takes_features_of_another_network():
    """A second decoder has its own random weights, for any initial weights of the network."""
    build = NetworkFactory(load_config("sample", ["data.root=x", "model.channels=16"]).model, 5)
    network = build()
    started = dataclasses.replace(build, init=network.state_dict())
    decoder = started.decoder()
    assert [p for name, p in decoder.named_parameters() if name.startswith("backbone")] == []
    assert not torch.equal(decoder.classifier.weight, network.classifier.weight)
    assert decoder.segment(*network.features(torch.randn(2, 3, 33, 33))).shape == (2, 5, 9, 9)


def test_without_dropout():
    """Norm layers stay in training mode, and the modes are restored afterwards."""
    model = DeepLabV3Plus("resnet18", 5, dropout=(0.5, 0.5, 0.5), correlation=True, **SMALL)
    images = torch.randn(2, 3, 33, 33)
    with without_dropout(model):
        before = model.pyramid.mean[1].running_mean.clone()
        assert torch.equal(model(images).logits, model(images).logits)
        assert not torch.equal(before, model.pyramid.mean[1].running_mean)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(images).logits, model(images).logits)
    model.eval()
    with without_dropout(model):
        pass
    assert not any(module.training for module in model.modules())
