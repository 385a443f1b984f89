"""Scores, windows, crops."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from corrmatch.config import Config, EvalConfig
from corrmatch.data.datasets import Data, Item
from corrmatch.models.network import Network, Prediction
from corrmatch.training.evaluate import Scores, evaluate, segment, sliding_window, starts


class Brightness(Network):
    """A network that labels three classes by brightness."""

    def forward(self, images):
        self.size = tuple(images.shape[2:])
        bright = images.mean(1)
        return Prediction(torch.stack([-bright - 1, torch.zeros_like(bright), bright - 1], 1))


CLASSES = ["dark", "middle", "light", "other"]


@pytest.fixture
def data(tmp_path):
    """Seven images of different sizes. Brightness labels all their rows but one right."""
    items = []
    for i in range(7):
        size = (20 + i, 16)
        shade = torch.randint(3, (size[1], size[0]))
        image = (125 * shade).to(torch.uint8).unsqueeze(-1).expand(-1, -1, 3).contiguous()
        mask = shade.clone()
        mask[0] = (mask[0] + 1) % 3
        mask[1] = 255
        paths = [tmp_path / f"{i}.{kind}.png" for kind in ("image", "mask")]
        for path, x in zip(paths, (image, mask.to(torch.uint8)), strict=True):
            Image.fromarray(x.numpy()).save(path)
        items.append(Item(str(i), *paths))
    table = torch.arange(256).to(torch.uint8)
    return Data([], [], items, CLASSES, table)


def config(**settings):
    full = Config(eval=EvalConfig(**settings))
    full.train.workers, full.train.crop = 0, 9
    return full


def test_known_scores():
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    scores = Scores.of(confusion, ["a", "b", "gone"], 4)
    assert scores.iou[:2] == pytest.approx([6 / 9, 3 / 6])
    assert math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((6 / 9 + 0.5) / 2)
    assert scores.accuracy == pytest.approx(9 / 12)
    lines = [line.split() for line in scores.table().splitlines()]
    assert lines == [
        ["4", "images"], ["a", "66.67"], ["b", "50.00"], ["gone", "n/a"], ["mean", "IoU", "58.33"],
        ["accuracy", "75.00"],
    ]  # fmt: skip


def test_a_class_that_is_only_predicted_counts_as_missed():
    assert Scores.of(torch.tensor([[3, 1], [0, 0]]), ["a", "b"], 1).iou == [0.75, 0]


def test_evaluation_against_a_count_by_hand(data):
    scores = evaluate(Brightness(), data, config(), torch.device("cpu"))
    widths = range(20, 27)
    assert scores.accuracy == pytest.approx(sum(14 * w for w in widths) / sum(15 * w for w in widths))
    assert math.isnan(scores.iou[3])
    assert scores.images == 7
    assert not math.isnan(scores.miou)


def test_centre_crop(data):
    scores = evaluate(Brightness(), data, config(mode="center_crop"), torch.device("cpu"))
    assert scores.accuracy == 1  # the wrong row and the ignored one are outside


def test_evaluation_leaves_the_mode(data):
    network = Brightness().train()
    evaluate(network, data, config(), torch.device("cpu"))
    assert network.training


def test_windows_cover_everything_once_a_stride():
    assert starts(10, 4, 3) == [0, 3, 6]
    assert starts(11, 4, 3) == [0, 3, 6, 7]
    assert starts(4, 4, 3) == [0]
    assert starts(3, 4, 3) == [0]


@pytest.mark.parametrize("size", [(20, 31), (8, 8), (5, 40), (8, 9)])
def test_sliding_window_of_a_pointwise_network_is_the_network(size):
    network, image = Brightness(), torch.randn(3, *size)
    whole = network(image.unsqueeze(0)).logits[0].softmax(0)
    torch.testing.assert_close(sliding_window(network, image, 8, 5), whole)
    assert max(network.size) <= 8
    settings = EvalConfig(mode="sliding", window=8, stride=5)
    assert torch.equal(segment(network, image, settings), segment(network, image, EvalConfig()))


def test_overlapping_windows_are_averaged():
    """The network's logits depend on the column of a pixel within the window."""

    class Left(Network):
        def forward(self, images):
            ramp = (0.1 + 0.2 * torch.arange(images.shape[3]).clamp(max=4)).expand(1, *images.shape[2:])
            return Prediction(torch.stack([ramp, 1 - ramp], 1).log())

    found = sliding_window(Left(), torch.zeros(3, 1, 7), 5, 2)[0, 0]
    ramp = torch.linspace(0.1, 0.9, 5)
    expected = [ramp[0], ramp[1], (ramp[2] + ramp[0]) / 2, (ramp[3] + ramp[1]) / 2, (ramp[4] + ramp[2]) / 2, ramp[3],
                ramp[4]]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected))
