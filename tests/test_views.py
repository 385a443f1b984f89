"""Views of an image: geometry, colours, boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from corrmatch.data import views
from corrmatch.data.boxes import cut_mix_box
from corrmatch.data.datasets import IGNORE
from corrmatch.data.views import WEAK_STRONG, WEAK_STRONG_STRONG, Distortion, Geometry, View


def test_image_and_labels_move_together():
    """The image encodes the label, so the two agree at every pixel of a view."""
    ids = torch.arange(6).repeat_interleave(20).view(1, -1).expand(90, -1).clone()
    image = tv_tensors.Image((40 * ids).to(torch.uint8).expand(3, -1, -1).clone())
    seen = []
    for key in range(20):
        with views.seeded(key):
            view = views.labeled_view(image, tv_tensors.Mask(ids.to(torch.uint8)), 65)
        assert tuple(view["image"].shape) == (3, 65, 65)
        deviation, mean = (torch.tensor(x).view(3, 1, 1) for x in (views.DEVIATION, views.MEAN))
        shown = ((view["image"] * deviation + mean) * 255).mean(0)
        padding = view["label"] == IGNORE
        seen.append(padding.float().mean())
        assert shown[padding].abs().max() < 0.01 if padding.any() else True
        near = (shown - 40 * view["label"]).abs() < 12
        assert near[~padding].float().mean() > 0.85
    assert 0 < np.mean(seen) < 0.5


def test_unlabelled_views():
    image = tv_tensors.Image(torch.randint(50, 200, (3, 60, 60), dtype=torch.uint8))
    changed, boxes, ignored = [], [], []
    for key in range(40):
        with views.seeded(key):
            view = views.unlabeled_views(image, 65)
        changed.append(not torch.equal(view["weak"], view["strong"][0]))
        boxes.append(view["box"].float().mean().item())
        black = (view["weak"] == view["weak"].amin((1, 2), keepdim=True)).all(0)
        assert (black | ~view["ignore"]).all()
        ignored.append(view["ignore"].float().mean().item())
    assert np.mean(changed) > 0.8
    assert 0.2 < np.mean([box > 0 for box in boxes]) < 0.8
    assert min(box for box in boxes if box > 0) > 0.01
    assert max(boxes) < 0.45
    assert min(ignored) == 0
    assert max(ignored) > 0.4


def test_seeded_leaves_no_trace():
    before = torch.get_rng_state()
    with views.seeded(1, 2):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with views.seeded(1, 2):
        assert torch.equal(torch.rand(3), inside)
    with views.seeded(1, 3):
        assert not torch.equal(torch.rand(3), inside)


def test_strong_views_and_boxes_are_drawn_apart():
    image = tv_tensors.Image(torch.randint(50, 200, (3, 60, 60), dtype=torch.uint8))
    different = []
    for seed in range(12):
        with views.seeded(seed):
            view = views.unlabeled_views(image, 49, WEAK_STRONG_STRONG)
        assert view["strong"].shape == (2, 3, 49, 49)
        assert view["box"].shape == (2, 49, 49)
        different.append([not torch.equal(*view[name]) for name in ("strong", "box")])
    assert all(sum(column) > 6 for column in zip(*different, strict=True))


def test_the_plain_view_does_not_depend_on_strong_ones():
    """Methods with other strong views have the same crops."""
    image = tv_tensors.Image(torch.randint(50, 200, (3, 60, 60), dtype=torch.uint8))
    weak = []
    for view in (View(), WEAK_STRONG, WEAK_STRONG_STRONG):
        with views.seeded(5):
            weak.append(views.unlabeled_views(image, 49, view)["weak"])
    assert torch.equal(weak[0], weak[1])
    assert torch.equal(weak[0], weak[2])


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (1, 40), (3, 200)])
@pytest.mark.parametrize("pad", ["right", "around"])
def test_thin_images(size, pad):
    image = tv_tensors.Image(torch.full((3, *size), 9, dtype=torch.uint8))
    for seed in range(10):
        with views.seeded(seed):
            view = views.unlabeled_views(image, 33, View(Geometry(pad=pad), strong=1))
        assert view["weak"].shape == (3, 33, 33)
        assert not view["ignore"].all()


def test_padding():
    image = tv_tensors.Image(torch.full((3, 10, 10), 200, dtype=torch.uint8))
    for pad, inside in (("right", (0, 0)), ("around", (11, 11))):
        view = views.unlabeled_views(image, 33, View(Geometry(scales=(1, 1), flip=0, pad=pad, fill=views.GRAY)))
        expected = torch.ones(33, 33, dtype=torch.bool)
        expected[inside[0] : inside[0] + 10, inside[1] : inside[1] + 10] = False
        assert torch.equal(view["ignore"], expected)
        assert view["weak"][:, expected].abs().max() < 0.01  # 0 after normalisation


def test_boxes_are_drawn_as_published():
    """The statistics of FixMatch's and UniMatch's box over many draws, within four standard errors."""
    masks = [cut_mix_box((321, 321)) for _ in range(4000)]
    shapes = torch.tensor([(m.any(1).sum(), m.any(0).sum()) for m in masks if m.any()], dtype=torch.float64)
    assert len(shapes) / len(masks) == pytest.approx(0.496, abs=0.035)
    area, ratio = shapes.prod(1) / 321**2, shapes[:, 0] / shapes[:, 1]
    assert area.mean().item() == pytest.approx(0.209, abs=0.01)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    assert area.quantile(levels).tolist() == pytest.approx([0.039, 0.208, 0.379], abs=0.016)
    assert ratio.mean().item() == pytest.approx(1.62, abs=0.08)
    assert ratio.quantile(levels).tolist() == pytest.approx([0.51, 1.54, 3.06], abs=0.13)


def test_colours_are_drawn_as_published():
    """Probabilities of the strong view: 0.8 jitter, 0.2 gray, 0.5 blur."""
    image = tv_tensors.Image(torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8))
    drawn = [views.Colour()(image) for _ in range(1500)]
    gray = np.mean([torch.equal(x[0], x[1]) and torch.equal(x[1], x[2]) for x in drawn])
    assert gray == pytest.approx(0.2, abs=0.045)
    unchanged = np.mean([torch.equal(x, image) for x in drawn])  # a faint blur shows nothing
    assert unchanged == pytest.approx(0.2 * 0.8 * (0.5 + 0.5 * 0.09), abs=0.03)
    none = views.Colour(chance=0, gray=0, blur=0)
    assert torch.equal(none(image), image)


def test_blur_covers_its_deviation():
    """A bright pixel becomes a Gaussian of the drawn deviation, up to three deviations."""
    image = tv_tensors.Image(torch.zeros(3, 33, 33, dtype=torch.uint8))
    image[:, 16, 16] = 255
    blurred = views.Colour(chance=0, gray=0, blur=1, sigma=(2.0, 2.0))(image)[0].float()
    assert (blurred[16] > 0).sum() >= 9
    offset = (torch.arange(33) - 16.0).square()
    share = blurred.sum(0) / blurred.sum()
    assert (share * offset).sum().sqrt().item() == pytest.approx(2.0, abs=0.35)


def test_a_labelled_image_can_have_strong_views():
    image = tv_tensors.Image(torch.randint(50, 200, (3, 60, 60), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.randint(0, 3, (60, 60), dtype=torch.uint8))
    view = views.labeled_view(image, mask, 49, View(strong=1, colour=views.Colour(chance=1, gray=1, blur=0)))
    assert view.keys() == {"image", "label", "strong"}
    gray = view["strong"][0] * torch.tensor(views.DEVIATION).view(3, 1, 1) + torch.tensor(views.MEAN).view(3, 1, 1)
    torch.testing.assert_close(gray[0], gray[2], rtol=0, atol=1e-5)


def test_each_distortion_by_itself():
    """Brightness adds, contrast multiplies, saturation keeps the lightest channel and the order of the others."""
    image = tv_tensors.Image(torch.randint(60, 180, (3, 9, 7), dtype=torch.uint8))
    nothing = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "chance": 1}
    assert (Distortion(**nothing)(image).int() - image.int()).abs().max() <= 1
    assert torch.equal(Distortion(chance=0)(image), image)
    for name, amount in (("brightness", 0.2), ("contrast", 0.4), ("saturation", 0.4), ("hue", 0.3)):
        x = Distortion(**nothing | {name: amount})(image)
        assert x.dtype == torch.uint8
        before, after = image.float(), x.float()
        if name == "brightness":
            assert (after - before).std() < 1
            assert (after - before).abs().max() <= 0.2 * 255 + 1
        elif name == "contrast":
            assert ((after + 0.5) / before).std() < 0.02
        else:
            assert (after.amax(0) - before.amax(0)).abs().max() <= 1
        if name == "saturation":
            spread = (before.amax(0) - before.amin(0)).clamp(min=1)
            share = ((after.amax(0) - after.amin(0)) / spread)[spread > 30]
            assert share.min() > 0.5
            assert share.max() < 1.5
            assert share.std() < 0.1
