"""Exported networks: their results, their data, and messages about mistakes."""

from __future__ import annotations

import json
import sys

import onnxruntime
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from training import VIT, small_config, stop_after

from corrmatch import cli
from corrmatch.data.views import DEVIATION, MEAN
from corrmatch.models.dpt import DPT
from corrmatch.training.export import METADATA, program_of
from corrmatch.training.predict import load_model
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

# The first is a multiple of no stride, the second of both; the third has one pixel more than a multiple.
SIZES = [(1, 75, 101), (2, 64, 96), (3, 49, 130)]


@pytest.fixture(params=["dpt", "deeplabv3plus"])
def checkpoint(request, small_sample, tmp_path):
    """The checkpoint of a run of two steps, with a correlation head and an averaged network."""
    overrides = ("method=unimatch_v2", "propagation.head=true", *(VIT if request.param == "dpt" else ()))
    run = Trainer(small_config(small_sample, tmp_path / "run", *overrides))
    stop_after(run, 2)
    run.run()
    return tmp_path / "run" / "last.pt"


def assert_agrees(say, network):
    for batch, height, width in SIZES:
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = network.whole(images)
        found = say(images)
        assert found.shape == (batch, expected.shape[1], height, width)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_programs_say_what_the_network_says(checkpoint, tmp_path, capsys):
    network, _, classes = load_model(checkpoint)
    for name in ("net.pt2", "net.onnx"):
        assert cli.main(["export", str(checkpoint), str(tmp_path / "out" / name)]) == 0
        assert str(tmp_path / "out" / name) in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["net.onnx", "net.pt2"]

    files = {METADATA: ""}
    program = torch.export.load(tmp_path / "out" / "net.pt2", extra_files=files).module()
    assert_agrees(lambda images: program(images).detach(), network)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "net.onnx", providers=["CPUExecutionProvider"])
    assert_agrees(lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), network)

    expected = {"classes": classes, "mean": MEAN, "deviation": DEVIATION}
    assert json.loads(files[METADATA]) == expected
    carried = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(carried[name]) for name in expected} == expected


def test_other_patches():
    """Patches of 14 pixels, whose multiples are other sizes."""
    vit = VisionTransformer(112, 14, embed_dim=32, depth=4, num_heads=2, num_classes=0, dynamic_img_size=True)
    network = DPT(vit, 3, channels=8).eval()
    program = program_of(network).module()
    assert_agrees(lambda images: program(images).detach(), network)


def test_mistakes_are_explained(checkpoint, tmp_path, capsys, monkeypatch):
    assert cli.main(["export", str(checkpoint), str(tmp_path / "net.pth")]) == 1
    assert "expected the name of a .pt2 or an .onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", str(checkpoint), str(tmp_path / "net.onnx")]) == 1
    assert "corrmatch export needs onnxscript: pip install 'corrmatch[export]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("net*"))
