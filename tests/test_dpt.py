"""DPT over vision transformers of timm."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from training import VIT, assert_same, small_config, stop_after

from corrmatch.config import ConfigError, EvalConfig, ModelConfig
from corrmatch.methods import build_method
from corrmatch.models.dpt import DPT
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import enlarge
from corrmatch.training import checkpoint
from corrmatch.training.evaluate import segment, sliding_window
from corrmatch.training.predict import load_model, predict
from corrmatch.training.trainer import Trainer

TRAINED = (*VIT, "method=unimatch_v2", "unimatch_v2.threshold=0.2", "propagation.head=true")
ODD = [(33, 33), (49, 65), (7, 100), (1, 1)]


@pytest.fixture
def network():
    return DPT("test_vit", 5).eval()


@pytest.mark.parametrize(
    ("backbone", "blocks", "width", "levels", "millions"),
    [
        ("vit_small_patch14_dinov2", (2, 5, 8, 11), 64, [48, 96, 192, 384], (22.06, 2.67)),
        ("vit_base_patch14_dinov2", (2, 5, 8, 11), 128, [96, 192, 384, 768], (86.58, 10.65)),
        ("vit_large_patch14_dinov2", (4, 11, 17, 23), 256, [256, 512, 1024, 1024], None),
        ("vit_giant_patch14_dinov2", (9, 19, 29, 39), 384, [1536] * 4, None),
        ("vit_small_patch16_dinov3", (2, 5, 8, 11), 64, [48, 96, 192, 384], None),
    ],
)
def test_published_architecture(backbone, blocks, width, levels, millions):
    """The unit that the published decoder never uses is left out: 0.07 and 0.3 million parameters."""
    with torch.device("meta"):
        model = DPT(backbone, 21, correlation=False)
    assert tuple(model.blocks) == blocks
    assert model.classifier.in_channels == width
    assert [project.out_channels for project in model.project] == levels
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    if millions is not None:
        whole = sum(p.numel() for p in model.parameters())
        inside = sum(p.numel() for p in model.backbone.parameters())
        assert (inside / 1e6, (whole - inside) / 1e6) == pytest.approx(millions, abs=0.01)


def test_levels_at_the_published_crop():
    """Strides are 14/4, 14/2, 14 and 28, and those of logits 14/8. For 57 x 57 positions the last level has 29."""
    for side, levels in ((37, [148, 74, 37, 19]), (57, [228, 114, 57, 29])):
        with torch.device("meta"):
            model = DPT("vit_small_patch14_dinov2", 21, correlation=False)
            maps = [torch.empty(1, 384, side, side)] * 4
            sizes = [
                resize(project(x)).shape[2]
                for x, project, resize in zip(maps, model.project, model.resize, strict=True)
            ]
            assert sizes == levels
            assert model.segment(*maps).shape == (1, 21, 8 * side, 8 * side)


@pytest.mark.parametrize("size", ODD)
def test_images_are_fitted_to_the_patches(network, size):
    """Images are fitted to the nearest multiples. Logits of the fitted image are those of the image."""
    images = torch.randn(2, 3, *size)
    fitted = [16 * max(1, int(side / 16 + 0.5)) for side in size]
    small = F.interpolate(images, fitted, mode="bilinear", align_corners=True)
    out, expected = network(images, correlate=True), network(small, correlate=True)
    assert out.logits.shape[2:] == tuple(side // 2 for side in fitted)
    assert out.query.shape[2:] == tuple(side // 16 for side in fitted)
    for x, y in ((out.logits, expected.logits), (out.query, expected.query)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    logits = F.interpolate(expected.logits, fitted, mode="bilinear", align_corners=True)
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(network.whole(images), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(segment(network, images[0], EvalConfig()), network.whole(images[:1])[0].argmax(0))


def test_multiples_are_left_alone(network):
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(network.whole(images), enlarge(network(images).logits, (48, 64)), rtol=0, atol=0)


def test_sides_half_way_between_two_multiples_grow():
    with torch.device("meta"):
        model = DPT("vit_small_patch14_dinov2", 21)
    assert model.fitted((517, 518, 525, 7, 6, 500)) == [518, 518, 532, 14, 14, 504]


def test_windows_of_any_size(network):
    image = torch.randn(3, 70, 41)
    found = sliding_window(network, image, 33, 20)
    assert found.shape == (5, 70, 41)
    torch.testing.assert_close(found.sum(0), torch.ones(70, 41))
    alone = network.whole(image[None, :, :20, :8])[0].softmax(0)  # where no other window is: not the same image
    assert not torch.allclose(found[:, :20, :8], alone)
    corner = network.whole(image[None, :, :33, :33])[0].softmax(0)
    torch.testing.assert_close(found[:, :20, :8], corner[:, :20, :8])


def test_position_tables_are_resampled_by_timm(network):
    """At the size of the weights the table is the stored one."""
    backbone = network.backbone
    side = backbone.patch_embed.grid_size[0]
    table = backbone.pos_embed
    grids = {size: backbone._pos_embed(torch.zeros(1, *size, table.shape[2])) for size in ((side, side), (side + 3, 4))}
    torch.testing.assert_close(grids[side, side][:, 1:], table[:, 1:], rtol=0, atol=0)
    expected = timm.layers.resample_abs_pos_embed(table, [side + 3, 4], num_prefix_tokens=1)
    torch.testing.assert_close(grids[side + 3, 4][:, 1:], expected[:, 1:], rtol=0, atol=0)


def test_features_are_those_of_the_blocks_behind_the_last_norm(network):
    found, given = [], torch.randn(2, 3, 48, 64)
    for number in network.blocks:
        network.backbone.blocks[number].register_forward_hook(lambda _, inputs, out: found.append(out))
    features = network.features(given)
    assert len(features) == 4
    for x, tokens in zip(features, found, strict=True):
        expected = network.backbone.norm(tokens)[:, 1:].mT.unflatten(2, (3, 4))
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("backbone", ["test_vit2", "vit_tiny_patch16_dinov3_qkvb"])
def test_other_transformers(backbone):
    """With registers, pooling before the norm, or rotary positions every parameter has a gradient."""
    network = DPT(backbone, 3)
    network.whole(torch.randn(2, 3, 40, 50)).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None and not name.startswith("correlation.")]
    assert idle == []


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vit_tny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        ("swin_tiny_patch4_window7_224", "expected a plain vision transformer"),
        ("test_vit_relpos", "takes no images of any size"),
        ("resnet18", "takes no images of any size"),
    ],
)
def test_wrong_backbones_are_explained(backbone, message):
    with pytest.raises(ValueError, match=message):
        DPT(backbone, 5)


def test_weights_from_a_file(tmp_path):
    """Weights of the published encoder also have a mask token, which is not used."""
    torch.manual_seed(0)
    source = timm.create_model("test_vit", num_classes=0)
    torch.save(source.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "weights.pth")
    model = DPT("test_vit", 5, pretrained=str(tmp_path / "weights.pth"))
    assert_same(dict(model.backbone.state_dict()), dict(source.state_dict()))
    torch.save({"cls_token": source.cls_token.detach()}, tmp_path / "few.pth")
    with pytest.raises(ValueError, match="no weights of test_vit from"):
        DPT("test_vit", 5, pretrained=str(tmp_path / "few.pth"))


def test_checkpointing_computes_the_same():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DPT("test_vit", 5, checkpointing=checkpointing)
        assert model.backbone.grad_checkpointing is checkpointing
        model(torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48)).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*gradients)
    with pytest.raises(ConfigError, match=r"^model\.checkpointing: of vision transformers alone"):
        NetworkFactory(ModelConfig(backbone="test_resnet", pretrained=False, checkpointing=True), 5)()


@pytest.mark.slow
@pytest.mark.parametrize("network", [VIT, ()], ids=["dpt", "deeplabv3plus"])
def test_a_frozen_backbone_stays_as_it_is(small_sample, tmp_path, network, fresh_process):
    frozen = ("model.frozen=true", "train.optimizer=adamw", "train.weight_decay=0.1")
    run = Trainer(small_config(small_sample, tmp_path / "run", "method=unimatch_v2", *network, *frozen))
    before = {name: x.clone() for name, x in run.method.state_dict().items()}
    stop_after(run, 2)
    run.run()
    after = run.method.state_dict()
    inside = [name for name in after if name.startswith("model.backbone.")]
    assert_same({name: after[name] for name in inside}, {name: before[name] for name in inside})
    assert not torch.equal(after["model.decode.0.weight" if network else "model.reduce.0.weight"],
                           before["model.decode.0.weight" if network else "model.reduce.0.weight"])  # fmt: skip
    assert not any("backbone" in name for name, _ in run.method.trained())
    assert not any(module.training for module in run.method.model.train().backbone.modules())


@pytest.mark.slow
def test_trains_resumes_and_predicts_at_odd_sizes(small_sample, tmp_path, fresh_process):
    """Sizes of images and windows are no multiples of the patch. Both networks are scored."""
    overrides = (*TRAINED, "train.crop=53", "eval.mode=sliding", "eval.window=65", "eval.stride=43", "train.epochs=1")
    ends = []
    for folder in ("whole", "halves"):
        config = small_config(small_sample, tmp_path / folder, *overrides, "train.save_every=2")
        run = Trainer(config)
        if folder == "halves":
            run.steps = 2
            run.run()
            run.save(["last.pt"])
            torch.manual_seed(12345)
            run = Trainer(config, resume=True)
            assert run.step == 2
        stop_after(run, 4)
        run.run()
        ends.append(checkpoint.load(tmp_path / folder / "last.pt"))
    for content in ends:
        content.pop("config")
    assert_same(*ends)
    for i, size in enumerate([(31, 50), (17, 97), (64, 48)]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "in" / f"{i}.png")
    model, config, classes = load_model(tmp_path / "whole" / "last.pt")
    assert predict(model, config, classes, tmp_path / "in", tmp_path / "out", torch.device("cpu")) == 3
    for i, size in enumerate([(31, 50), (17, 97), (64, 48)]):
        with Image.open(tmp_path / "out" / "index" / f"{i}.png") as index:
            assert index.size == size


def test_correlation_channels_are_a_key(tmp_path):
    """As published, the number of channels is the number of classes."""
    for channels, expected in ((None, 150), (32, 32)):
        config = small_config("x", tmp_path, *VIT, f"model.correlation_channels={channels or 'null'}")
        method = build_method(config, 150)
        out = method.model(torch.randn(1, 3, 48, 48), correlate=True)
        assert out.query.shape == out.key.shape == (1, expected, 3, 3)
        assert method.propagation.logits(out).shape == (1, 150, 3, 3)
