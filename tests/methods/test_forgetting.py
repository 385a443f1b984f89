"""Forgetting, compared with recordings of the published code, and its phases."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from child import in_two_processes
from PIL import Image
from recordings import load, method_of, progress, recorded, relative
from torch import nn
from training import assert_same, assert_same_end, run_killed_while_writing, small_config

from corrmatch.config import ConfigError, PropagationConfig, load_config, parse
from corrmatch.data.datasets import IGNORE, Data, DataError, Item, find_data
from corrmatch.methods import build_method, forgetting
from corrmatch.methods.base import Run
from corrmatch.methods.parts import rehearsal
from corrmatch.methods.parts.labelling import fingerprint
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.rehearsal import (
    Rehearsal,
    Rules,
    Said,
    drop,
    merge,
)  # fmt: skip
from corrmatch.models.deeplab import DeepLabV3Plus
from corrmatch.models.network import Prediction
from corrmatch.training import checkpoint
from corrmatch.training.trainer import Trainer

FILES = recorded("45_forgetting_*")
PUBLISHED = Rules(classes=6, ratio=1.0, gap=0.15, background=0, dropped_loses=False)
OFF = Propagation(PropagationConfig(head=False, regions=False))
RATIOS = {"lb20": 0.2, "lb60": 0.6, "lb100": 1.0}


class ByColour(nn.Module):
    """Returns the recorded logits of each image. The colour of an image encodes its number."""

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
    """A run with images of these sizes, each of a single colour."""
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
    """From images to label maps on disk."""
    at, now = load(path), load(path, f"{prefix}_")
    current, previous = (ByColour(at[f"lb_{name}"]) for name in ("current", "previous"))
    run, made = run_of(tmp_path, sizes(at)), Rehearsal(tmp_path / "maps", "x", 2)
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
        answer = rehearsal.ask(current, image).said
        kept.append(drop(answer, thresholds).labels.flatten() != IGNORE)
        both = merge(drop(answer, thresholds), drop(rehearsal.ask(previous, image).said, thresholds), rules)
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
    """Logits that depend on the number of the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, numbers, **kept):
        return Prediction(self.logits[numbers])


PHASES = ("method=forgetting", "forgetting.ratios=[0.5,1]", "forgetting.labeled=[1,2]", "train.batch_size=3",
          "train.epoch_steps=2", "train.save_every=100")  # fmt: skip
REGIONS = ("propagation.head=true", "propagation.regions=true", "propagation.region_threshold=0.5")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("more", [(), REGIONS], ids=["plain", "propagation"])
def test_killed_in_the_middle_of_labelling(small_sample, tmp_path, monkeypatch, more):
    """Nothing is lost or done twice, and the run ends as one that was not killed."""
    whole = Trainer(small_config(small_sample, tmp_path / "whole", *PHASES, *more))
    whole.run()
    config = small_config(small_sample, tmp_path / "halves", *PHASES, *more)
    # killed in the first network's maps, in the second one's, in the second phase
    written = run_killed_while_writing(config, (7, 21, 40), (2, 4), monkeypatch)
    pieces = [path for path in written if path.suffixes == [".png"]]
    assert len(pieces) == len(set(pieces)) == 2 * 2 * 8  # phases, networks, images
    assert_same_end(tmp_path / "whole", tmp_path / "halves")
    for path in (tmp_path / "whole" / "labels").rglob("*.png"):
        other = tmp_path / "halves" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    left = {path.name for path in (tmp_path / "halves" / "labels").iterdir()}
    assert left == {"phase_2"}
    assert not list((tmp_path / "halves" / "labels").rglob("work"))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_a_resumed_run_checks_its_labels(small_sample, tmp_path):
    config = small_config(small_sample, tmp_path / "run", *PHASES, "train.save_every=1")
    run = Trainer(config)
    run.ends = [*run.ends[:1], 3]
    run.steps = 3
    run.run()  # into the second phase
    maps = tmp_path / "run" / "labels" / "phase_1" / "second"
    (maps / "000003.share.png").unlink()
    run = Trainer(config, resume=True)
    with pytest.raises(DataError, match=r"1 of 8 maps are missing, 000003\.share\.png"):
        run.run()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_phases(small_sample, tmp_path):
    """The labelling network of each phase, its earlier weights, and the composition of a batch."""
    run = Trainer(small_config(small_sample, tmp_path / "run", *PHASES, "forgetting.first_lr=0.01"))
    method = run.method
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.01, 0.01]
    first = next(run.loader())
    assert {name: len(part["image"]) for name, part in first.items()} == {"labeled": 3, "labeled_peer": 3}
    streams = method.streams()
    assert [streams[name].part for name in ("labeled", "labeled_peer")] == [(0.0, 0.8), (1 - 0.8, 1.0)]
    made, make = [], Rehearsal.make

    def watched(rehearsal, current, previous, rules, *rest):
        state = None if previous is None else copy.deepcopy(previous.state_dict())
        made.append((current is method.peer, state, rules.ratio))
        return make(rehearsal, current, previous, rules, *rest)

    for network in method.networks:
        nn.init.normal_(network.classifier.bias)
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in method.networks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "make", watched)
        for phase, sizes in ((1, (1, 2)), (2, (2, 1))):
            run.step = run.ends[phase - 1]
            run.start_phase(phase)
            batch = next(run.loader())
            assert len(batch["labeled"]["image"]) == len(batch["labeled_peer"]["image"]) == sizes[0]
            assert len(batch["unlabeled"]["weak"]) == len(batch["unlabeled_peer"]["weak"]) == sizes[1]
            assert method.streams()["unlabeled"].maps["pseudo"].folder.name == "second"
            assert method.streams()["unlabeled_peer"].maps["confidence"].folder.name == "first"
            assert [group["lr"] for group in run.optimizer.param_groups] == [0.05, 0.05]
            for network in method.networks:
                nn.init.normal_(network.classifier.bias)  # as if trained
    assert [(peer, previous is None, ratio) for peer, previous, ratio in made] == [
        (False, True, 0.5), (True, True, 0.5), (False, False, 1.0), (True, False, 1.0)
    ]  # fmt: skip
    assert_same([previous for _, previous, _ in made[2:]], before)


def test_options_that_cannot_be():
    def build(*overrides):
        return build_method(load_config("sample", ["data.root=x", "method=forgetting", *overrides]), 6)

    with pytest.raises(ConfigError, match=r"forgetting\.labeled: expected numbers below train\.batch_size"):
        build("forgetting.labeled=[1,4]")
    with pytest.raises(ConfigError, match=r"forgetting\.background: expected one of 6 classes"):
        build("forgetting.background=6")


def run_in_two(data, folder):
    """Runs all phases; both processes label."""
    torch.set_num_threads(1)
    Trainer(small_config(data, folder, *PHASES, "train.cpu=true")).run()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_two_processes(small_sample, tmp_path):
    """The maps of the last phase equal those that one process makes with the same networks."""
    folder = tmp_path / "two"
    in_two_processes(__file__, f"run_in_two({str(small_sample)!r}, Path({str(folder)!r}))", tmp_path)
    content = checkpoint.load(folder / "last.pt")
    assert (content["step"], content["phase"], len(content["random"])) == (6, 2, 2)
    config = small_config(small_sample, folder, *PHASES)
    method = build_method(config, 6)
    method.load_state_dict(content["method"])
    found = find_data(config.data)
    run = Run(found, config, tmp_path, torch.device("cpu"), 0, 1)
    for name, previous in zip(("first", "second"), method.previous, strict=True):
        made = Rehearsal(folder / "labels" / "phase_2" / name, fingerprint(previous.network), 2)
        for maps in (made.labels, made.confidence):
            maps.check(found.unlabeled, found.classes)  # those networks made them
        alone = Rehearsal(tmp_path / name, fingerprint(previous.network), 2)
        thresholds = alone.make(previous.network, None, replace(PUBLISHED, ratio=1.0), OFF, run, "test")
        assert np.array_equal(np.load(made.labels.folder / "thresholds.npy"), thresholds.numpy())
