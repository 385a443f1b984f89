"""From a checkpoint to pictures, and the commands around it."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from training import SMALL, shorten

from corrmatch import cli
from corrmatch.data.datasets import IGNORE
from corrmatch.training import pictures
from corrmatch.training.predict import KINDS, load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the sample, a run on it and its predictions, all by the commands."""
    folder = tmp_path_factory.mktemp("trained")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["sample", str(folder / "data")]) == 0
    shorten(folder / "data", labeled=4, unlabeled=4, val=3)
    overrides = [
        *SMALL,
        f"data.root={folder / 'data'}",
        f"work_dir={folder / 'run'}",
        "train.ema=0.5",
        "train.epochs=10",
    ]
    assert cli.main(["train", "sample", *overrides]) == 0
    (folder / "pictures").mkdir()
    for i, (size, kind) in enumerate({(50, 40): "jpg", (33, 70): "png"}.items()):
        Image.effect_noise(size, 60).convert("RGB").save(folder / "pictures" / f"p{i}.{kind}")
    Image.new("P", (41, 41)).save(folder / "pictures" / "indexed.gif")
    (folder / "pictures" / "notes.txt").write_text("not a picture")
    return folder


def test_predictions_are_written_at_original_size(trained, capsys):
    run, source, out = trained / "run" / "best.pt", trained / "pictures", trained / "out"
    assert cli.main(["predict", str(run), str(source), str(out)]) == 0
    assert capsys.readouterr().out == f"3 pictures: {out}\n"
    assert {path.name for path in out.iterdir()} == set(KINDS)
    _, _, classes = load_model(run)
    colors = pictures.palette(classes)
    for path in source.glob("*.*g*"):
        index, color, over = (Image.open(out / kind / f"{path.stem}.png") for kind in KINDS)
        with Image.open(path) as picture:
            assert index.size == color.size == over.size == picture.size
        ids = np.array(index)
        assert ids.max() < len(classes)
        assert np.array_equal(np.array(color), colors.numpy()[ids])
        assert np.array_equal(np.array(index.convert("RGB")), np.array(color))


def test_the_averaged_weights_are_what_is_used(trained):
    model, config, classes = load_model(trained / "run" / "last.pt")
    content = torch.load(trained / "run" / "last.pt", map_location="cpu", weights_only=True)
    weight = model.state_dict()["decode.2.weight"]
    assert torch.equal(weight, content["method"]["average.network.decode.2.weight"])
    assert not torch.equal(weight, content["method"]["model.decode.2.weight"])
    assert not model.training
    assert config.train.ema == 0.5
    assert len(classes) == 6


def test_evaluation_of_a_checkpoint_is_that_of_its_run(trained, capsys):
    assert cli.main(["eval", str(trained / "run" / "last.pt")]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("3 pictures\nbackground")
    scores = (trained / "run" / "scalars.jsonl").read_text().splitlines()[-1]
    miou = float(scores.split('"miou": ')[1].split(",")[0])
    assert float(re.search(r"mean IoU +([\d.]+)", plain)[1]) == pytest.approx(100 * miou, abs=0.005)
    assert cli.main(["eval", str(trained / "run" / "last.pt"), "eval.mode=sliding"]) == 0
    assert capsys.readouterr().out != plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sample", "data.rot=x"], "corrmatch train: data.rot: no such key; did you mean data.root?\n"),
        (["train", "sample", "data.root=none"], "corrmatch train: data.root: none is not a folder\n"),
        (
            ["train", "sample", "data.root={root}", "work_dir={root}/new", "model.backbone=resnt18"],
            "corrmatch train: model.backbone: timm has no model 'resnt18'; did you mean 'resnet18'?\n",
        ),
        (["eval", "none.pt"], "corrmatch eval: none.pt: there is no such checkpoint\n"),
        (["eval", "{root}/classes.txt"], "corrmatch eval: {root}/classes.txt: not a checkpoint, or a broken one\n"),
        (["eval", "{root}/weights.pt"], "corrmatch eval: {root}/weights.pt: not a checkpoint of corrmatch\n"),
        (["predict", "{run}", "none", "out"], "corrmatch predict: none: expected a folder of pictures\n"),
        (["predict", "{run}", "{data}", "out"], "corrmatch predict: {data}: there are no pictures\n"),
    ],
)
def test_mistakes_are_said_in_a_line(trained, capsys, arguments, message):
    places = {"run": trained / "run" / "best.pt", "root": trained / "data", "data": trained / "data" / "splits"}
    torch.save({"weight": torch.zeros(1)}, trained / "data" / "weights.pt")
    assert cli.main([argument.format(**places) for argument in arguments]) == 1
    assert capsys.readouterr().err == message.format(**places)


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "corrmatch.training.commands", raising=False)
    monkeypatch.delattr("corrmatch.training.commands", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert cli.main(["sample", "x"]) == 1
    assert capsys.readouterr().err == "corrmatch sample needs accelerate: pip install 'corrmatch[train]'\n"


def test_overlay_tints_outlines_and_spares_the_background():
    picture = torch.full((4, 6, 3), 100, dtype=torch.uint8)
    labels = torch.zeros(4, 6, dtype=torch.long)
    labels[:, 3:] = 1
    classes = ["background", "thing"]
    colors = pictures.palette(classes)
    shown = pictures.overlay(picture, labels, classes, colors)
    assert (shown[:, :3] == 75).all()
    assert (shown[:, 3] == 255).all()
    assert torch.equal(shown[0, 4], ((100 + colors[1].float()) / 2).round().to(torch.uint8))


def test_colours_differ():
    colors = pictures.palette([str(i) for i in range(21)])[:21].float()
    distances = torch.cdist(colors, colors) + 1000 * torch.eye(21)
    assert distances.min() > 15
    assert pictures.palette(["a"])[IGNORE].tolist() == [255, 255, 255]
    assert pictures.palette(["Background", "b"])[0].tolist() == [0, 0, 0]
