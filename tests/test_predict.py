"""Predictions from a checkpoint, and the commands for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn
from training import SMALL, shorten

from corrmatch import cli
from corrmatch.config import Config
from corrmatch.data.datasets import IGNORE, DataError
from corrmatch.models.network import Network, Prediction
from corrmatch.training import visualization
from corrmatch.training.predict import KINDS, load_model, predict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the sample, a run and its predictions, made by the commands."""
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
    (folder / "images").mkdir()
    for i, (size, kind) in enumerate({(50, 40): "jpg", (33, 70): "png"}.items()):
        Image.effect_noise(size, 60).convert("RGB").save(folder / "images" / f"p{i}.{kind}")
    Image.new("P", (41, 41)).save(folder / "images" / "indexed.gif")
    (folder / "images" / "notes.txt").write_text("not an image")
    return folder


class Stripes(Network):
    """A network that labels three classes by the column."""

    def forward(self, images):
        column = torch.arange(images.shape[3]) // 5 % 3
        return Prediction(
            3 * nn.functional.one_hot(column, 3).permute(1, 0).unsqueeze(1).expand(1, -1, *images.shape[2:])
        )


def segmented(source, out):
    return predict(Stripes(), Config(), ["background", "a", "b"], source, out, torch.device("cpu"))


def written(out):
    """The names of the files, which are the same for all kinds of output, and their sizes."""
    sizes = [{path.name: Image.open(path).size for path in (out / kind).iterdir()} for kind in KINDS]
    assert sizes[0] == sizes[1] == sizes[2]
    return sizes[0]


def draw(folder, **sizes):
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        Image.effect_noise(size, 60).convert("RGB").save(folder / name.replace("_", "."))


def test_one_broken_image_stops_no_other(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    draw(source, a_jpg=(8, 9), c_png=(5, 4), e_jpg=(1, 30), f_png=(40, 1))
    whole = (source / "c.png").read_bytes()
    (source / "b.png").write_bytes(whole[: len(whole) // 2])
    (source / "d.jpg").write_bytes(b"")
    Image.new("F", (4, 4)).save(source / "g.tif")
    (source / "._a.jpg").write_bytes(b"\0\5\26\7")
    (source / "Thumbs.db").write_bytes(b"\0")
    (source / "folder.png").mkdir()
    with pytest.raises(DataError) as caught:
        segmented(source, out)
    first, *broken = str(caught.value).splitlines()
    assert first == f"4 images: {out}; 3 cannot be used:"
    assert [line.split(":")[0].strip() for line in broken] == [
        str(source / name) for name in ("b.png", "d.jpg", "g.tif")
    ]
    assert written(out) == {"a.png": (8, 9), "c.png": (5, 4), "e.png": (1, 30), "f.png": (40, 1)}
    assert f"{source}: 2 files are no images, passed over: ._a.jpg, Thumbs.db\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b.png", "a.b.gif"], ["a.png", "b.png", "a.b.png"]),
        (["a.jpg", "a.png", "b.tif"], ["a.jpg.png", "a.png.png", "b.png"]),
        (["a.JPG", "A.jpg", "b.tif"], ["a.JPG.png", "A.jpg.png", "b.png"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg.png", "a.png.png", "a.jpg.png.png"]),
        (["a.jpg", "a.jpg.bmp"], ["a.png", "a.jpg.bmp.png"]),
    ],
)
def test_results_do_not_overwrite_each_other(tmp_path, names, expected):
    source, out = tmp_path / "in", tmp_path / "out"
    sizes = [(4 + i, 9 - i) for i in range(len(names))]
    source.mkdir()
    for name, size in zip(names, sizes, strict=True):
        Image.new("RGB", size).save(source / name)
    assert segmented(source, out) == len(names)
    assert written(out) == dict(zip(expected, sizes, strict=True))


def test_predictions_lie_as_people_see_the_image(tmp_path):
    (tmp_path / "in").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 36)).save(tmp_path / "in" / "a.jpg", exif=turned)
    segmented(tmp_path / "in", tmp_path / "out")
    assert written(tmp_path / "out") == {"a.png": (36, 60)}


def test_home_and_places_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    draw(tmp_path / "in", a_jpg=(8, 9))
    assert segmented(Path("~/in"), Path("~/out")) == 1
    assert written(tmp_path / "out") == {"a.png": (8, 9)}
    (tmp_path / "file").write_text("x")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "color").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file", tmp_path / "half", Path("/proc/nowhere")):
        with pytest.raises(DataError, match=f"^{out}/(index|color): cannot be written: "):
            segmented(tmp_path / "in", out)
    assert cli.main(["sample", str(tmp_path / "file" / "data")]) == 1
    assert capsys.readouterr().err.startswith("corrmatch sample: [Errno 20] Not a directory: ")
    assert cli.main(["sample", "~/drawn"]) == 0
    assert (tmp_path / "drawn" / "classes.txt").exists()


def test_predictions_are_written_at_original_size(trained, capsys):
    run, source, out = trained / "run" / "best.pt", trained / "images", trained / "out"
    assert cli.main(["predict", str(run), str(source), str(out)]) == 0
    assert capsys.readouterr().out == f"3 images: {out}\n"
    assert {path.name for path in out.iterdir()} == set(KINDS)
    _, _, classes = load_model(run)
    colors = visualization.palette(classes)
    for path in source.glob("*.*g*"):
        index, color, over = (Image.open(out / kind / f"{path.stem}.png") for kind in KINDS)
        with Image.open(path) as image:
            assert index.size == color.size == over.size == image.size
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
    assert plain.startswith("3 images\nbackground")
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
            [
                "train",
                "sample",
                "data.root={root}",
                "work_dir={root}/new",
                "data.check=false",
                "model.backbone=resnt18",
            ],
            "corrmatch train: model.backbone: timm has no model 'resnt18'; did you mean 'resnet18'?\n",
        ),
        (["eval", "none.pt"], "corrmatch eval: none.pt: there is no such checkpoint\n"),
        (["eval", "{root}/classes.txt"], "corrmatch eval: {root}/classes.txt: not a checkpoint, or a broken one\n"),
        (["eval", "{root}/weights.pt"], "corrmatch eval: {root}/weights.pt: not a checkpoint of corrmatch\n"),
        (["predict", "{run}", "none", "out"], "corrmatch predict: none: expected a folder of images\n"),
        (["predict", "{run}", "{data}", "out"], "corrmatch predict: {data}: there are no images\n"),
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
    image = torch.full((4, 6, 3), 100, dtype=torch.uint8)
    labels = torch.zeros(4, 6, dtype=torch.long)
    labels[:, 3:] = 1
    classes = ["background", "thing"]
    colors = visualization.palette(classes)
    shown = visualization.overlay(image, labels, classes, colors)
    assert (shown[:, :3] == 75).all()
    assert (shown[:, 3] == 255).all()
    assert torch.equal(shown[0, 4], ((100 + colors[1].float()) / 2).round().to(torch.uint8))


def test_colours_differ():
    colors = visualization.palette([str(i) for i in range(21)])[:21].float()
    distances = torch.cdist(colors, colors) + 1000 * torch.eye(21)
    assert distances.min() > 15
    assert visualization.palette(["a"])[IGNORE].tolist() == [255, 255, 255]
    assert visualization.palette(["Background", "b"])[0].tolist() == [0, 0, 0]
