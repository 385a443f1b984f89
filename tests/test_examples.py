"""Runs of the examples."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "examples" / "propagate_labels.py"
IGNORE = 255


def run(folder, *arguments, script=SCRIPT):
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def accuracies(printed):
    found = dict(re.findall(r"(nearest labelled pixel|propagated)\s+accuracy\s+([\d.]+) %", printed))
    return float(found["propagated"]), float(found["nearest labelled pixel"])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder and the output of a run without arguments."""
    folder = tmp_path_factory.mktemp("sample")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return Path(re.search(r"panel: (.*)", done.stdout)[1]).parent, done.stdout


def test_generated_sample_beats_the_nearest_label(sample):
    folder, printed = sample
    propagated, nearest = accuracies(printed)
    assert propagated > nearest + 2
    assert propagated > 97
    assert re.search(r"propagated in [\d.]+ s", printed)
    with Image.open(folder / "panel.png") as panel:
        assert panel.width > 1000
        assert panel.height > 800


def test_sparse_labels_with_truth_and_refinement(sample, tmp_path):
    folder, _ = sample
    dense = np.array(Image.open(folder / "labels.png"))
    kept = np.random.default_rng(1).random(dense.shape) < 0.02
    Image.fromarray(np.where(kept, dense, IGNORE).astype(np.uint8)).save(tmp_path / "sparse.png")
    files = (folder / "image.png", tmp_path / "sparse.png", tmp_path / "out.png")
    done = run(tmp_path, *files, "--truth", folder / "labels.png", "--refine", "--grid", "100")
    assert done.returncode == 0, done.stderr
    assert f"{kept.sum()} of them labelled" in done.stdout
    propagated, nearest = accuracies(done.stdout)
    assert propagated > nearest
    assert (tmp_path / "out.png").exists()


def test_without_truth_no_accuracy_is_claimed(sample, tmp_path):
    folder, _ = sample
    done = run(tmp_path, folder / "image.png", folder / "labels.png", tmp_path / "out.png", "--grid", "40")
    assert done.returncode == 0, done.stderr
    assert "mean IoU" not in done.stdout
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((5, 5), np.uint8), "expected 8-bit class ids"),
        (np.zeros((240, 320, 3), np.uint8), "expected 8-bit class ids"),
        (np.full((240, 320), IGNORE, np.uint8), "every pixel is 255"),
    ],
    ids=["size", "channels", "empty"],
)
def test_unusable_labels_are_explained(sample, tmp_path, labels, message):
    Image.fromarray(labels).save(tmp_path / "labels.png")
    done = run(tmp_path, sample[0] / "image.png", tmp_path / "labels.png", tmp_path / "out.png")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# Arguments that make a script quick, and the rows of its table, the better ones last.
QUICK = {
    "across_images": (["out.png"], ["same place", "carried over"]),
    "frozen_features": (
        ["--no-pretrained", "--model", "vit_tiny_patch16_224", "--size", "128", "--out", "out.png"],
        ["most frequent class", "propagated"],
    ),
    "fixmatch": (["--steps", "6", "--out", "out.png"], ["labelled alone", "with propagation"]),
    "head_on_smp": (["--steps", "3", "--out", "out.png"], ["logits", "propagated logits", "both"]),
}
TRAINED = ("fixmatch", "head_on_smp")  # there is no gain after so few steps


@pytest.mark.parametrize("name", QUICK)
def test_prints_what_it_gained_and_writes_a_image(name, tmp_path):
    arguments, expected = QUICK[name]
    done = run(tmp_path, *arguments, script=SCRIPT.with_name(f"{name}.py"))
    assert done.returncode == 0, done.stderr
    found = {key.strip(): float(iou) for key, iou in re.findall(r"^  (.+?) +mean IoU +([\d.]+) %$", done.stdout, re.M)}
    assert set(expected) <= set(found)
    assert all(0 < iou <= 100 for iou in found.values())
    if name not in TRAINED:
        assert found[expected[-1]] > found[expected[0]] + 10
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 700


def test_labels_are_carried_to_the_next_frames(tmp_path):
    """The frames of a film that pans over a drawn scene, with random weights. Frames between the labelled ones have no
    labels.
    """
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        draw_scene = importlib.import_module("scenes").draw_scene
    finally:
        sys.path.pop(0)
    image, labels = (np.asarray(x) for x in draw_scene(5, 256))
    lines = []
    for i in range(3):
        view = slice(40 * i, 40 * i + 160)
        Image.fromarray((255 * image[:, :, view]).astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
        Image.fromarray(labels[:, view].astype(np.uint8)).save(tmp_path / f"mask{i}.png")
        lines.append(f"{i}.png mask{i}.png\n")
    (tmp_path / "film.txt").write_text("".join(lines))
    arguments = (
        tmp_path,
        "--list",
        "film.txt",
        "--labelled",
        "0",
        "--frames",
        "2",
        "--no-pretrained",
        "--out",
        "out.png",
    )
    done = run(tmp_path, *arguments, script=SCRIPT.with_name("carry_labels.py"))
    assert done.returncode == 0, done.stderr
    found = {key.strip(): float(x) for key, x in re.findall(r"^  (.+?) +accuracy +([\d.]+) %", done.stdout, re.M)}
    for step in (1, 2):
        assert found[f"carried over, {step} on"] > found[f"same place, {step} on"] + 3
    with Image.open(tmp_path / "out.png") as panel:
        assert panel.width > 1000


@pytest.mark.parametrize("name", [*QUICK, "carry_labels"])
def test_short_enough_to_read(name):
    assert len(SCRIPT.with_name(f"{name}.py").read_text().splitlines()) < 120


def test_weights_out_of_reach_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = run(tmp_path, script=SCRIPT.with_name("frozen_features.py"))
    assert done.returncode == 1
    assert "no weights" in done.stderr
    assert "--no-pretrained" in done.stderr
