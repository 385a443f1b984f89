"""Predictions averaged over scales, and the teachers that use them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from training import small_config

from corrmatch.config import Config, ConfigError, PropagationConfig, load_config
from corrmatch.methods import build_method
from corrmatch.methods.parts import teacher
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.scales import predict
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction
from corrmatch.training import diagnostics
from corrmatch.training.trainer import Trainer

METHODS = ("fixmatch", "unimatch", "unimatch_v2", "corrmatch")


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = Config().model
    config.backbone, config.pretrained, config.channels = "test_resnet", None, 8
    return NetworkFactory(config, 4, correlation=True, pretrained=False)().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 49, 33, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_probabilities_are_averaged_over_reflected_views(network, images):
    out = predict(network, images, (0.5, 1.0, 1.4), correlate=True, features=True)
    plain = network(images, correlate=True, features=True)
    size = plain.logits.shape[2:]
    expected = [plain.logits.double().softmax(1)]
    for sides in ((24, 16), (49, 33), (69, 46)):  # rounded halves go to the even number
        view = F.interpolate(images, sides, mode="bilinear", align_corners=True).flip(3)
        p = network.whole(view).softmax(1).double()
        expected.append(F.interpolate(p, size, mode="bilinear", align_corners=True).flip(3))
    torch.testing.assert_close(out.logits.double().softmax(1), sum(expected) / 4, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.logits.exp().sum(1), torch.ones(2, *size))
    assert torch.equal(out.query, plain.query)
    assert torch.equal(out.features, plain.features)


@torch.no_grad()
def test_without_scales_it_is_the_prediction_of_the_network(network, images):
    assert torch.equal(predict(network, images, ()).logits, network(images).logits)


@torch.no_grad()
def test_a_probability_of_zero_stays_finite_and_the_dtype_is_kept(network, images):
    network.classifier.bias[0] = -1e4
    for dtype in (torch.float32, torch.bfloat16):
        logits = predict(network.to(dtype), images.to(dtype), (0.75,)).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert (logits[:, 0] < -80).all()


@pytest.mark.parametrize("name", METHODS)
def test_they_need_a_teacher(name):
    keys = [f"method={name}", "data.root=x", "model.backbone=test_resnet", "model.pretrained=false"]
    keys.append(f"{name}.extra_scales=[0.75]")
    if name != "unimatch_v2":  # it always has one
        with pytest.raises(ConfigError, match=rf"^{name}\.extra_scales: expected {name}\.teacher"):
            build_method(load_config("folder", keys), 3)
    method = build_method(load_config("folder", [*keys, f"{name}.teacher=eval"]), 3)
    assert list(method.extra_scales) == [0.75]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("name", METHODS)
def test_pseudo_labels_are_made_at_all_scales(name, small_sample, tmp_path, monkeypatch):
    """All labels of a step, also those that CutMix pastes. The networks that are evaluated see one scale."""
    keys = (f"{name}.teacher=eval", f"{name}.extra_scales=[0.75,1.5]", "propagation.regions=false")
    run = Trainer(small_config(small_sample, tmp_path, f"method={name}", *keys))

    def predict_third_class(network, images, scales, **asked):
        out = network(images, **asked)
        assert scales == (0.75, 1.5)
        return out._replace(logits=torch.full_like(out.logits, -50).index_fill_(1, torch.tensor(2), 0.0))

    monkeypatch.setattr(teacher, "predict", predict_third_class)
    seen, original = [], run.method.propagation.targets
    monkeypatch.setattr(run.method.propagation, "targets", lambda *args: seen.append(args[0]) or original(*args))
    run.advance(run.loader())
    assert len(seen) == (2 if name.startswith("unimatch") else 1)
    for pseudo in seen:
        assert (pseudo.labels == 2).all()
    monkeypatch.undo()
    assert run.method.evaluated["teacher"] is run.method.teacher.network


def test_diagnostics_measure_the_labels_of_all_scales(monkeypatch):
    class Method:
        extra_scales, threshold, labeller = (0.75,), 0.0, torch.nn.Identity()
        propagation = Propagation(PropagationConfig(head=False))

    given = []

    def recording(network, image, scales, **asked):
        given.append((network, tuple(image.shape), scales, asked))
        return Prediction(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9))  # class 1 everywhere

    monkeypatch.setattr(diagnostics, "predict", recording)
    monkeypatch.setattr(diagnostics, "Labelled", lambda *_: [(torch.rand(3, 9, 9), torch.ones(9, 9, dtype=torch.long))])
    config = Config()
    config.train.crop, config.train.workers = 9, 0
    data = type("Data", (), {"classes": ["a", "b"], "table": None})
    sums = diagnostics.count(Method, [None], data, config, torch.device("cpu"))
    assert given == [(Method.labeller, (1, 3, 9, 9), (0.75,), {"correlate": False, "features": False})]
    assert sums["before"].tolist() == [[0, 0], [0, 81]]
