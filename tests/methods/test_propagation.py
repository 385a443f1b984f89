"""The keys `propagation.*` and `train.labels_first`, and the weights of CorrMatch's terms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from recordings import progress
from training import scalars, small_config

from corrmatch.config import ConfigError, PropagationConfig
from corrmatch.masks import RegionMasks
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.models.network import Prediction
from corrmatch.training.trainer import Trainer

ON = PropagationConfig(head=True, regions=True)


@pytest.fixture
def pseudo():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 16, 24), generator=generator, dtype=torch.uint8)
    labels[:, :, :20] = 1  # a class that dominates
    return PseudoLabels(
        labels, torch.rand(labels.shape, generator=generator), torch.zeros(labels.shape, dtype=torch.bool)
    )


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(1)
    return RegionMasks.from_bool(torch.rand(2, 5, 16, 24, generator=generator) < 0.6)


def targets(config, pseudo, masks, threshold):
    return Propagation(config).targets(pseudo, threshold, masks, pseudo.counted, 3)


def test_a_confirmed_pixel_keeps_its_label_and_becomes_reliable(pseudo, masks):
    labels, reliable = targets(dataclasses.replace(ON, rule="confirm"), pseudo, masks, 0.4)
    given, after = targets(ON, pseudo, masks, 0.4)
    before = pseudo.reliable(0.4)
    assert torch.equal(labels, pseudo.labels)
    assert (reliable & ~before).any(), "the case confirms nothing"
    assert (given != labels).any(), "the case has nothing to rewrite"
    assert torch.equal(reliable, before | (after & (given == labels)))


def test_labels_are_propagated_along_the_features_of_the_decoder():
    generator = torch.Generator().manual_seed(0)
    features, logits = (torch.randn(2, c, 5, 7, generator=generator) for c in (6, 3))
    found = Propagation(PropagationConfig(label_temperature=0.2)).spread(Prediction(logits, features=features))
    x = features.flatten(2).double()
    x = x / x.norm(dim=1, keepdim=True)
    p = (x.mT @ x / 0.2).softmax(2)
    expected = logits.double().softmax(1).flatten(2) @ p / p.sum(1, keepdim=True)
    torch.testing.assert_close(found.softmax(1).flatten(2).double(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(found.argmax(1), logits.argmax(1)), "the case changes no label"
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2", "corrmatch"])
def test_methods_label_with_propagated_logits(name, small_sample, tmp_path, monkeypatch):
    """If these are certain, all pixels are reliable."""
    run, asked = (
        Trainer(small_config(small_sample, tmp_path, f"method={name}", "propagation.label_temperature=0.1")),
        [],
    )

    def certain(part, out):
        assert out.features is not None
        asked.append(out)
        return torch.zeros_like(out.logits).index_fill(1, torch.tensor(2), 50.0)

    monkeypatch.setattr(Propagation, "spread", certain)
    run.advance(run.loader())
    assert asked
    assert run.log.write(1, {})["reliable"] == 1


def test_without_the_key_labels_stay():
    logits = torch.randn(1, 3, 2, 2)
    off = Propagation(PropagationConfig())
    assert not off.spreads
    assert torch.equal(off.spread(Prediction(logits.requires_grad_())), logits)
    assert not off.spread(Prediction(logits)).requires_grad
    with pytest.raises(ValueError, match="features=True"):
        Propagation(PropagationConfig(label_temperature=0.1)).spread(Prediction(logits))


@pytest.mark.parametrize("name", ["supervised", "dual_teacher"])
def test_methods_that_cannot_propagate_labels_refuse(name, small_sample, tmp_path):
    with pytest.raises(ConfigError, match=rf"propagation.label_temperature: .*{name}"):
        Trainer(small_config(small_sample, tmp_path, f"method={name}", "propagation.label_temperature=0.1"))


def test_regions_have_a_threshold_of_their_own(pseudo, masks):
    config = dataclasses.replace(ON, region_threshold=0.4)
    for threshold in (0.4, torch.tensor(0.4), torch.full((3,), 0.4)):
        for x, y in zip(targets(config, pseudo, masks, threshold), targets(ON, pseudo, masks, 0.4), strict=True):
            assert torch.equal(x, y)
    never = targets(dataclasses.replace(ON, region_threshold=1.0), pseudo, masks, 0.4)
    assert torch.equal(never[0], pseudo.labels)  # no region is dominated wholly
    assert torch.equal(never[1], pseudo.reliable(0.4))


def test_starts():
    part = Propagation(dataclasses.replace(ON, regions_from=3, corr_from=2, num_masks=4))
    maps = [torch.randn(1, 3, 5, 5) for _ in range(3)]
    out = Prediction(maps[0], None, maps[1], maps[2])
    assert [part.masks(out, (9, 9), progress(step)) is None for step in range(5)] == [True] * 3 + [False] * 2
    assert [part.from_start(torch.tensor(2.0), progress(step)).item() for step in range(4)] == [0, 0, 2, 2]


@pytest.mark.parametrize("method", ["fixmatch", "corrmatch", "unimatch"])
def test_labels_first(small_sample, tmp_path, method):
    overrides = (f"method={method}", "train.labels_first=2", "train.epoch_steps=4", "train.seed=3")
    Trainer(small_config(small_sample, tmp_path / "run", *overrides)).run()
    steps = scalars(tmp_path / "run")
    supervised = {"x", "x_corr"} if method == "corrmatch" else {"x"}
    terms = [{name for name in line if name in ("x", "x_corr", "s", "s1")} for line in steps]
    assert terms[:2] == [supervised, supervised]
    assert all(len(found) > len(supervised) for found in terms[2:])
    plain = (*overrides[2:], "method=supervised", f"propagation.head={method == 'corrmatch'}")
    Trainer(small_config(small_sample, tmp_path / "plain", *plain)).run()
    alone = scalars(tmp_path / "plain")
    assert [line["x"] for line in steps[:2]] == [line["x"] for line in alone[:2]]


def test_a_method_without_such_steps_says_so(small_sample, tmp_path):
    config = small_config(small_sample, tmp_path / "run", "method=prcl", "train.labels_first=2")
    with pytest.raises(ConfigError, match=r"^train\.labels_first: method prcl has no such steps; see model\.init"):
        Trainer(config)


@pytest.mark.parametrize("term", ["s", "kl", "fp", "corr"])
def test_a_term_of_weight_0_is_left_out_and_the_others_stay(small_sample, tmp_path, term):
    lines = {}
    for name, weight in (("all", 0.125), ("without", 0)):
        # Dropouts of the perturbed branch are drawn from the global generator.
        config = small_config(small_sample, tmp_path / name, f"corrmatch.{term}_weight={weight}", "train.epoch_steps=1",
                              "corrmatch.teacher=eval", "corrmatch.threshold=0.2")  # fmt: skip
        Trainer(config).run()
        lines[name] = scalars(tmp_path / name)[0]
    assert term in lines["all"]
    assert term not in lines["without"]
    # The supervised terms see the dropouts of the network, which the perturbed branch draws from too.
    kept = {"s", "kl", "corr"} - {term} | ({"x", "x_corr"} if term != "fp" else set())
    assert {name: lines["without"][name] for name in kept} == pytest.approx({name: lines["all"][name] for name in kept})
    weights = {"x": 0.25, "x_corr": 0.25} | dict.fromkeys(("s", "kl", "fp", "corr"), 0.125)
    for line in lines.values():
        assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in weights if name in line))
