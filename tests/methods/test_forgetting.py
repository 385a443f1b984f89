"""Forgetting against recordings of the published code, and its phases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from recordings import load, method_of, progress, recorded, relative
from torch import nn

from corrmatch.config import PropagationConfig, parse
from corrmatch.data.datasets import IGNORE, Data, Item
from corrmatch.methods import forgetting
from corrmatch.methods.base import Run
from corrmatch.methods.parts import rehearsal
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.rehearsal import Rehearsal, Rules, Said, drop, merge
from corrmatch.models.deeplab import DeepLabV3Plus
from corrmatch.models.network import Prediction

FILES = recorded("45_forgetting_*")
PUBLISHED = Rules(ratio=1.0, gap=0.15, background=0, dropped_loses=False)
OFF = Propagation(PropagationConfig(head=False, regions=False))
RATIOS = {"lb20": 0.2, "lb60": 0.6, "lb100": 1.0}


class ByColour(nn.Module):
    """Says of each image what was recorded: which one it is shows in its colour."""

    fitting = DeepLabV3Plus.fitting

    def __init__(self, logits):
        super().__init__()
        self.logits, self.asked, self.modes = logits, [], []

    def forward(self, images, **kept):
        assert images.shape[2:] == (33, 33)
        number = round(images[0, 0].mean().item()) + 2
        self.asked.append(number)
        self.modes.append(self.training)
        return Prediction(self.logits[number : number + 1])


def run_of(folder, sizes, config=None):
    """Images of these sizes, of one colour each."""
    items = []
    for i, size in enumerate(sizes):
        path = folder / f"{i}.png"
        value = round(255 * (0.485 + 0.229 * (i - 2)))  # normalised: i - 2
        Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
        items.append(Item(str(i), path, None))
    config = config or parse([{"data": {"root": "x"}, "method": "forgetting", "train": {"workers": 0}}])
    data = Data([], items, [], [f"class {c}" for c in range(6)], torch.arange(256, dtype=torch.uint8))
    return Run(data, config, folder, torch.device("cpu"), 0, 1)


def sizes(at):
    return list(zip(at["lb_heights"].tolist(), at["lb_widths"].tolist(), strict=True))


@FILES
@pytest.mark.parametrize("prefix", RATIOS)
def test_recorded_labels(path, prefix, tmp_path):
    """From images to maps on disk."""
    at, now = load(path), load(path, f"{prefix}_")
    current, previous = (ByColour(at[f"lb_{name}"]) for name in ("current", "previous"))
    run, made = run_of(tmp_path, sizes(at)), Rehearsal(tmp_path / "maps", "x", 2, 1.0)
    rules = replace(PUBLISHED, ratio=RATIOS[prefix])
    thresholds = made.make(current.train(), previous.train(), rules, OFF, run, "test")
    assert relative(thresholds, now["thresholds"]) < 1e-6
    kept = []
    for i, size in enumerate(sizes(at)):
        expected = now[f"picture{i}"]
        assert torch.equal(made.labels.read(i, size).float(), expected[..., 0])
        stored = made.confidence.read(i, size)
        assert (stored - expected[..., 1]).abs().max() < 0.5 / 65_535 + 1e-6
        image = torch.full((3, *size), float(i - 2))
        said = rehearsal.ask(current, image).said
        kept.append(drop(said, thresholds).labels.flatten() != IGNORE)
        both = merge(drop(said, thresholds), drop(rehearsal.ask(previous, image).said, thresholds), rules)
        assert relative(both.confidence, expected[..., 1]) < 1e-6  # before it is stored
    assert torch.cat(kept).float().mean().item() == pytest.approx(now["share"].item(), rel=1e-6)
    assert not any(current.modes + previous.modes)
    assert current.training


@FILES
def test_recorded_merge(path):
    at = load(path)
    current, previous = (Said(at[f"mg_{name}"][..., 0].long(), at[f"mg_{name}"][..., 1])
                         for name in ("current", "previous"))  # fmt: skip
    merged = merge(current, previous, PUBLISHED)
    assert torch.equal(torch.stack([merged.labels.float(), merged.confidence], 2), at["mg_merged"])
    assert (current.labels == IGNORE).any()


@FILES
@pytest.mark.parametrize(("prefix", "exponents"), [("ls55", (5, 5)), ("ls32", (3, 2)), ("ls00", (0, 0))])
def test_recorded_loss(path, prefix, exponents):
    now = load(path, f"{prefix}_")
    leaf, labels, confidence = now["logits"].requires_grad_(), now["targets"][:, 0].long(), now["targets"][:, 1]
    agree, disagree = exponents
    method = method_of("forgetting", 6, Fixed(leaf), Fixed(leaf), agree=agree, disagree=disagree)
    # Labelled images come first here, in the recording last.
    side = forgetting.Side(torch.tensor([3, 0, 1, 2]), labels[[3, 0, 1, 2]], confidence[[3, 0, 1, 2]], 1)
    loss, values = method.learn(method.model, side, progress())
    assert loss.item() == pytest.approx(now["loss"].item(), rel=1e-6)
    loss.backward()
    assert relative(leaf.grad, now["grad"]) < 1e-6
    kept = (labels != IGNORE).flatten(1).sum(1)
    if any(exponents):
        for name, count in (("disagree", now["disagree"]), ("surer", now["current_wins"])):
            assert round(values[name].item() * kept[:3].sum().item()) == count.item()
    mean = (values["weight"] * kept[:3].sum() + kept[3]) / kept.sum()
    assert mean.item() == pytest.approx(now["mean_weight"].item(), rel=1e-6)
    x = nn.functional.cross_entropy(leaf[3:], labels[3:], ignore_index=IGNORE)
    assert values["x"].item() == pytest.approx(x.item(), rel=1e-5)


class Fixed(nn.Module):
    """Logits by the number of the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, numbers, **kept):
        return Prediction(self.logits[numbers])
