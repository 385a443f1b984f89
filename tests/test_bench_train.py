"""The benchmark of a training step: both steps agree, and wrong steps are not timed."""

from __future__ import annotations

import json
import re

import bench_train
import pytest
import torch
from step import published
from step.planted import StepInputs

pytestmark = pytest.mark.slow

TINY = ["--crop", "33", "--budget", "0.1", "--device", "cpu", "--backbone", "test_resnet"]


@pytest.fixture(autouse=True)
def memory_is_not_filled():
    torch.use_deterministic_algorithms(False)


def test_parts_and_contenders(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert bench_train.main([*TINY, "--json", str(figures)]) == 0
    record, printed = json.loads(figures.read_text()), capsys.readouterr().out
    assert [line for line in printed.splitlines() if len(line) > 120] == []
    both = {"corrmatch", "published eager"}
    assert {part: set(rows) for part, rows in record["parts"].items()} == {
        "network": {"both"}, "method": both, "step": both
    }  # fmt: skip
    for rows in record["parts"].values():
        for row in rows.values():
            assert len(row["seconds"]) >= 3
            assert min(row["seconds"]) <= row["median"] <= max(row["seconds"])
    assert max(record["differences"]) < 1e-4
    assert {"device", "torch", "commit", "threads"} <= set(record["environment"])


def test_variants(capsys):
    assert bench_train.main([*TINY, "--variants", "bf16", "channels_last"]) == 0
    assert re.findall(r"^step +corrmatch \+ (\w+) ", capsys.readouterr().out, re.MULTILINE) == ["bf16", "channels_last"]


def test_the_planted_outputs_give_the_method_something_to_do():
    inputs = StepInputs(bench_train.parse([*TINY, "--crop", "65"]))
    _, scalars = inputs.ours(inputs.leaves()).train()(inputs.batch, inputs.progress())
    assert 0.1 < scalars["reliable"] < scalars["reliable_after"] < 1
    assert scalars["mask_area"] > 0.005


def test_a_step_that_disagrees_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(published, "masked_mean", lambda pixels, reliable, counted: pixels[reliable].mean())
    assert bench_train.main(TINY) == 1
    assert "WRONG, nothing timed" in capsys.readouterr().out


def test_methods(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    names = ["corrmatch", "supervised", "color_augmentation"]
    assert bench_train.main([*TINY, "--methods", *names, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())["methods"]
    assert list(found) == names
    passes = [tuple(row["passes"].values()) for row in found.values()]
    assert passes == [(2, 1), (1, 0), (2, 2)]
    assert all(len(row["seconds"]) >= 3 for row in found.values())
    printed = capsys.readouterr().out
    assert re.search(r"^supervised +1 \+ 0 +\d+", printed, re.MULTILINE)
    assert [line for line in printed.splitlines() if len(line) > 120] == []
