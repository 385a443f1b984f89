"""Scales and crops on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from recordings import recorded
from torchvision import tv_tensors

from corrmatch.data.datasets import IGNORE
from corrmatch.data.views import mirrored
from corrmatch.methods.parts.geometric import follow, place, scale_and_crop

FILES = recorded("44_prcl_*")


def test_scales_and_crops_are_those_of_torch():
    """Torch resizes, mirrors at the right and lower edge and crops each image separately. Labels are resized to the
    nearest.
    """
    images, labels = torch.rand(6, 3, 33, 29), torch.randint(5, (6, 33, 29))
    x, placed = scale_and_crop(images, (0.3, 1.7), torch.Generator().manual_seed(4))
    found = follow(placed, labels, IGNORE)
    rows, columns = placed
    assert x.shape == images.shape
    for i in range(6):
        size = (rows.scaled[i].item(), columns.scaled[i].item())
        expected = F.interpolate(images[i : i + 1], size, mode="bilinear", antialias=True)[0]
        at = (rows.place[i], columns.place[i])
        torch.testing.assert_close(x[i], expected[:, at[0][:, None], at[1]], rtol=1e-4, atol=1e-4)
        small = labels[i][torch.arange(size[0]) * 33 // size[0]][:, torch.arange(size[1]) * 29 // size[1]]
        inside = rows.inside[i][:, None] & columns.inside[i]
        assert torch.equal(found[i][inside], small[at[0][:, None], at[1]][inside])
        assert (found[i][~inside] == IGNORE).all()
        assert inside.sum() == min(33, size[0]) * min(29, size[1])
    assert rows.scaled.min() < 33 < rows.scaled.max()


def test_places_are_within_the_image():
    where = place(40, torch.tensor([0.01, 0.3, 1.0, 1.5]).repeat(50), torch.Generator().manual_seed(0))
    assert (where.place >= 0).all()
    assert (where.place < where.scaled).all()
    steps = where.place.diff(dim=1).abs()
    assert (steps <= 1).all()
    assert set(where.place[3::4, 0].tolist()) > {0, 20}  # every place of the crop, both ends among them
    assert torch.equal(where.place[2], torch.arange(40))
    assert where.inside[2::4].all()


def test_mirrored_images():
    image = tv_tensors.Image(torch.arange(6).view(1, 2, 3).expand(3, -1, -1).to(torch.uint8))
    wide = mirrored(image, (2, 9))
    assert wide[0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert mirrored(image, (5, 3))[0, :, 0].tolist() == [0, 3, 0, 3, 0]
    one = tv_tensors.Image(torch.full((3, 1, 1), 7, dtype=torch.uint8))
    assert (mirrored(one, (3, 4)) == 7).all()
    reference = F.pad(torch.rand(1, 3, 8, 9), (0, 5, 0, 4), mode="reflect")[0]
    assert torch.equal(mirrored(tv_tensors.Image(reference[:, :8, :9]), (12, 14)), reference)
