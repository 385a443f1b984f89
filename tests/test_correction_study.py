"""The study of corrected logits."""

from __future__ import annotations

import json

import correction_study
import pytest
import torch
from training import shorten, small_config

from corrmatch.data.classes import log_frequencies
from corrmatch.data.datasets import find_data
from corrmatch.data.sample import draw_sample
from corrmatch.training.evaluate import evaluate
from corrmatch.training.predict import load_model
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


def test_without_correction_it_is_the_evaluation(tmp_path):
    draw_sample(tmp_path / "sample")
    shorten(tmp_path / "sample", labeled=4, val=2)
    Trainer(small_config(tmp_path / "sample", tmp_path / "run", "method=supervised")).run()
    checkpoint, out = tmp_path / "run" / "last.pt", tmp_path / "out.json"
    correction_study.main([str(checkpoint), "--tau", "0", "8", "--views", "one", "several", "--out", str(out)])
    content = json.loads(out.read_text())
    found = {(row["views"], row["tau"]): row for row in content["results"]}
    assert len(found) == 4
    assert content["environment"]["commit"]
    network, config, classes = load_model(checkpoint)
    data = find_data(config.data)
    scores = evaluate(network, data, config, torch.device("cpu"))
    plain = found["one", 0.0]
    assert plain["miou"] == pytest.approx(100 * scores.miou, abs=0.01)
    assert plain["accuracy"] == pytest.approx(100 * scores.accuracy, abs=0.01)
    assert list(plain["iou"]) == classes
    assert found["several", 0.0]["iou"] != plain["iou"]
    # So strong a correction gives every pixel to the class with the fewest labels.
    rarest = classes[int(log_frequencies(data).argmin())]
    assert all(value == 0 for name, value in found["one", 8.0]["iou"].items() if name != rarest)
