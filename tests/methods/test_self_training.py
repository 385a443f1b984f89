"""Self-training in rounds: the labels of whole images, their views, correction and thresholds, and the phases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from child import in_two_processes
from recordings import method_of, progress
from torch import nn
from training import assert_same, assert_same_end, run_killed_while_writing, small_config

from corrmatch.config import ConfigError, load_config
from corrmatch.data.datasets import IGNORE, DataError, find_data, read_image
from corrmatch.data.views import normalize
from corrmatch.methods import build_method
from corrmatch.methods.base import Run
from corrmatch.methods.parts.labelling import fingerprint
from corrmatch.methods.parts.whole_labels import Views, WholeLabels
from corrmatch.models.network import Network, Prediction
from corrmatch.training import checkpoint
from corrmatch.training.trainer import Trainer

PHASES = ("method=self_training", "self_training.rounds=2", "self_training.scales=[1,1.25]",
          "self_training.class_share=0.6", "train.epoch_steps=2", "train.save_every=100")  # fmt: skip


@pytest.fixture(scope="module")
def network(small_sample):
    torch.manual_seed(0)
    return build_method(small_config(small_sample, "unused", "method=supervised"), 6).model


def run_of(sample, folder):
    config = small_config(sample, folder)
    return Run(find_data(config.data), config, folder, torch.device("cpu"), 0, 1)


def test_probabilities_are_means_over_the_views(network):
    image = torch.rand(3, 61, 83)
    found = Views((0.5, 1.0, 1.5), reflect=True).probability(network.train(), image)
    assert network.training
    network.eval()
    expected = []
    with torch.no_grad():
        for height, width in ((30, 42), (61, 83), (92, 124)):
            for axes in ((), (3,)):
                view = F.interpolate(image[None], (height, width), mode="bilinear").flip(axes)
                logits = network.whole(view).flip(axes)
                expected.append(F.interpolate(logits, (61, 83), mode="bilinear", align_corners=True).softmax(1)[0])
    torch.testing.assert_close(found, torch.stack(expected).mean(0))
    torch.testing.assert_close(Views().probability(network, image), expected[2])
    reflected = Views((1.0,), reflect=True).probability(network, image.flip(2)).flip(2)
    torch.testing.assert_close(reflected, Views((1.0,), reflect=True).probability(network, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_maps_and_thresholds(network, small_sample, tmp_path, share):
    """Labels and confidences are those of the mean over the views; a threshold is exact over all images."""
    run, views = run_of(small_sample, tmp_path), Views((1.0, 1.25))
    made = WholeLabels(tmp_path / "maps", "x", views)
    made.make(network, run, "labels")
    thresholds = made.thresholds(share, run)
    labels, steps = [], []
    for i, item in enumerate(run.data.unlabeled):
        image = normalize(read_image(item.image))
        expected = views.probability(network, image)
        stored = made.labels.read(i, image.shape[1:]).long()
        assert torch.equal(stored, expected.argmax(0))
        confidence = made.confidence.read(i, image.shape[1:])
        torch.testing.assert_close(confidence.as_subclass(torch.Tensor), expected.amax(0), rtol=0, atol=1 / 65_535)
        labels.append(stored.flatten())
        steps.append(confidence.flatten())
    label, confidence = torch.cat(labels), torch.cat(steps)
    for c in range(6):
        values = confidence[label == c].sort(descending=True).values
        if len(values) == 0:
            assert thresholds[c] == 0
        elif share == 0:
            assert thresholds[c] == 1
        else:
            needed = int(np.ceil(share * len(values)))
            assert thresholds[c] == values[needed - 1]
    facts = made.labels.facts
    assert facts == {"network": "x", "scales": [1.0, 1.25], "reflect": False}
    with pytest.raises(DataError, match="maps of other reflect"):
        WholeLabels(tmp_path / "maps", "x", Views((1.0, 1.25), reflect=True)).labels.check(
            run.data.unlabeled, run.data.classes
        )


class Numbered(nn.Module):
    """Logits that depend on the number of the image: the value of its first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images, **kept):
        return Prediction(self.logits[images[:, 0, 0, 0].long()])


def test_loss_equals_its_formula():
    """Cross-entropy with labels, and with pasted pseudo-labels that reach the thresholds of their classes."""
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 8, 8, requires_grad=True)
    method = method_of("self_training", 3, Numbered(logits))
    method.phase = 1
    method.thresholds.copy_(torch.tensor([0.2, 0.9, 0.5]))
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    box, ignore = torch.zeros(2, 1, 8, 8, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)
    box[0, :, 4:, 4:], ignore[1, :2] = True, True  # the first pixel is not pasted
    pseudo = torch.randint(3, (2, 8, 8), dtype=torch.uint8).masked_fill(ignore, IGNORE)
    confidence = torch.rand(2, 8, 8).masked_fill(ignore, 255.0)
    truth = torch.randint(3, (2, 8, 8), dtype=torch.uint8)
    truth[0, 0] = IGNORE
    unlabeled = {"weak": images[2:], "strong": images[2:, None], "box": box, "ignore": ignore, "pseudo": pseudo,
                 "confidence": confidence}  # fmt: skip
    loss, values = method({"labeled": {"image": images[:2], "label": truth}, "unlabeled": unlabeled}, progress())
    x = F.cross_entropy(logits[:2], truth.long(), ignore_index=IGNORE)
    target, sure, padded = pseudo.clone(), confidence.clone(), ignore.clone()
    for x_, y_ in ((target, pseudo), (sure, confidence), (padded, ignore)):
        x_[0, 4:, 4:] = y_[1, 4:, 4:]
    counts = (sure >= method.thresholds[target.masked_fill(padded, 0).long()]) & ~padded
    pixels = F.cross_entropy(logits[2:], target.masked_fill(padded, 0).long(), reduction="none")
    s = (pixels * counts).sum() / (~padded).sum()
    torch.testing.assert_close(values["x"], x.detach())
    torch.testing.assert_close(values["s"], s.detach())
    torch.testing.assert_close(loss, (x + s) / 2)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((x + s) / 2, logits)
    torch.testing.assert_close(found, expected)
    assert 0 < counts.sum() < counts.numel()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_phases(small_sample, tmp_path, anew, ema):
    """Which network labels, and from which weights a round starts."""
    keys = (f"self_training.anew={anew}", f"train.ema={ema}", "self_training.first_epochs=3")
    run = Trainer(small_config(small_sample, tmp_path / "run", *PHASES, *keys))
    method = run.method
    assert run.ends == [6, 8, 10]
    assert list(next(run.loader())) == ["labeled"]
    first = {k: v.clone() for k, v in method.model.state_dict().items()}
    for phase in (1, 2):
        for p in method.parameters():  # as if trained
            p.data.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
        labeller = method.model if ema == "null" else method.average.network
        expected, before = fingerprint(labeller), {k: v.clone() for k, v in method.model.state_dict().items()}
        run.step = run.ends[phase - 1]
        run.start_phase(phase)
        assert method.hash == expected
        assert_same(dict(method.model.state_dict()), first if anew else before)
        if ema != "null":
            assert_same(dict(method.average.network.state_dict()), dict(method.model.state_dict()))
        batch = next(run.loader())
        assert batch["unlabeled"]["pseudo"].shape == batch["unlabeled"]["confidence"].shape == (2, 49, 49)
        assert [path.name for path in (tmp_path / "run" / "labels").iterdir()] == [f"round_{phase}"]
        assert (method.thresholds > 0).any()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_killed_in_the_middle_of_labelling(small_sample, tmp_path, monkeypatch):
    """Nothing is lost or done twice, and the run ends as one that was not killed."""
    Trainer(small_config(small_sample, tmp_path / "whole", *PHASES)).run()
    config = small_config(small_sample, tmp_path / "halves", *PHASES)
    # killed in the first round, in the second one
    written = run_killed_while_writing(config, (5, 20), (2, 4), monkeypatch)
    pieces = [path for path in written if path.suffixes == [".png"]]
    assert len(pieces) == len(set(pieces)) == 2 * 8  # rounds, images
    assert_same_end(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_a_resumed_run_checks_its_labels(small_sample, tmp_path):
    config = small_config(small_sample, tmp_path / "run", *PHASES, "train.save_every=1")
    run = Trainer(config)
    run.ends = [*run.ends[:1], 3]
    run.steps = 3
    run.run()  # into the second phase
    (tmp_path / "run" / "labels" / "round_1" / "000003.share.png").unlink()
    run = Trainer(config, resume=True)
    with pytest.raises(DataError, match=r"1 of 8 maps are missing, 000003\.share\.png"):
        run.run()


def test_options_that_cannot_be():
    def build(*overrides):
        return build_method(load_config("sample", ["data.root=x", "method=self_training", *overrides]), 6)

    with pytest.raises(ConfigError, match=r"self_training\.scales: expected at least one scale"):
        build("self_training.scales=[]")
    with pytest.raises(ConfigError, match=r"propagation\.region_threshold: expected a value"):
        build("propagation.head=true", "propagation.regions=true")


def run_in_two(data, folder):
    """Runs all phases; both processes label."""
    torch.set_num_threads(1)
    Trainer(small_config(data, folder, *PHASES, "train.cpu=true")).run()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_two_processes(small_sample, tmp_path):
    """Both make the labels. The thresholds are those that one process finds in them."""
    folder = tmp_path / "two"
    in_two_processes(__file__, f"run_in_two({str(small_sample)!r}, Path({str(folder)!r}))", tmp_path)
    content = checkpoint.load(folder / "last.pt")
    assert (content["step"], content["phase"], len(content["random"])) == (6, 2, 2)
    config = small_config(small_sample, folder, *PHASES)
    method = build_method(config, 6)
    method.load_state_dict(content["method"])
    method.phase = 2
    data = find_data(config.data)
    made = method.made(2)
    for maps in (made.labels, made.confidence):
        maps.check(data.unlabeled, data.classes)
    run = Run(data, config, tmp_path, torch.device("cpu"), 0, 1)
    (made.labels.folder / "thresholds.npy").unlink()
    assert torch.equal(made.thresholds(0.6, run), method.thresholds)
    assert isinstance(method.model, Network)
