"""The study of pseudo-labels of a trained network."""

from __future__ import annotations

import json

import label_study
import pytest
import torch
import torch.nn.functional as F
from training import shorten, small_config

from corrmatch.data.datasets import IGNORE, find_data
from corrmatch.data.sample import draw_sample
from corrmatch.data.whole import Labelled
from corrmatch.training.predict import load_model
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


def test_it_measures_the_labels_of_the_network(tmp_path):
    draw_sample(tmp_path / "sample")
    shorten(tmp_path / "sample", labeled=4, val=2)
    names = "\n".join(f"labeled_{i:03}" for i in range(4, 9))  # listed as unlabelled; their masks are available
    (tmp_path / "sample" / "splits" / "unlabeled.txt").write_text(f"{names}\n")
    Trainer(small_config(tmp_path / "sample", tmp_path / "run", "method=supervised")).run()
    checkpoint = tmp_path / "run" / "last.pt"
    keys = ["--tau", "0", "0.5", "--temperature", "none", "0.1", "--share", "none", "0.25", "--out"]
    label_study.main([str(checkpoint), *keys, str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    found = {(r["tau"], r["temperature"], r["share"]): r for r in content["results"]}
    assert len(found) == 8

    network, config, classes = load_model(checkpoint)
    data = find_data(config.data)
    assert content["classes"] == classes
    right = total = 0
    with torch.inference_mode():
        for image, mask in Labelled(data.withheld, data.table, None):
            logits = network(image[None]).logits
            truth = F.interpolate(mask[None, None].float(), logits.shape[2:])[0, 0]
            known = truth != IGNORE
            right += (logits.argmax(1)[0] == truth)[known].sum().item()
            total += known.sum().item()
    plain = found[0.0, None, None]
    assert plain["right"] == pytest.approx(right / total)
    assert plain["kept"] == 1
    # Of each class, pixels are labelled right, labelled wrong or not kept.
    for row in found.values():
        for recall, wrong in zip(row["recall"], row["wrong"], strict=True):
            assert recall + wrong <= 1 + 1e-4
    assert 0.25 <= found[0.0, None, 0.25]["kept"] < 0.35
    assert found[0.0, 0.1, None]["right"] != plain["right"]
    assert found[0.5, None, None]["right"] != plain["right"]
