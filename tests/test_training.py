"""The loop: a step, resumption, several processes, every shipped configuration."""

from __future__ import annotations

import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_config import CONFIGS
from training import TINY, VIT, scalars, small_config, stop_after

from corrmatch import cli
from corrmatch.config import ConfigError, to_yaml
from corrmatch.data.datasets import DataError
from corrmatch.data.sample import draw_sample
from corrmatch.data.streams import Streams, batches
from corrmatch.methods import METHODS
from corrmatch.training import trainer
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


@pytest.fixture(scope="module")
def sample(small_sample):
    return small_sample


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_configuration_trains(sample, tmp_path, name):
    config = small_config(sample, tmp_path / "run", *(VIT if "dinov2" in name else ()), name=name)
    run = Trainer(config)
    stop_after(run, 2)
    scores = run.run()
    assert 0 < scores.accuracy < 1
    lines = scalars(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("method", ["supervised", "corrmatch"])
def test_training_lowers_the_supervised_loss(sample, tmp_path, method):
    config = small_config(sample, tmp_path / "run", f"method={method}", "train.epochs=6", "train.eval_every=6")
    Trainer(config).run()
    lines = scalars(tmp_path / "run")
    name = "loss" if method == "supervised" else "x"
    first, last = (np.mean([line[name] for line in part]) for part in (lines[:4], lines[-4:]))
    assert last < 0.8 * first
    if method == "corrmatch":
        assert all(line["mask_area"] > 0.01 for line in lines)
        assert all(line["reliable_after"] >= line["reliable"] for line in lines)
        assert len({line["threshold"] for line in lines}) == len(lines)


def test_a_work_dir_that_cannot_be_written_shows_before_files_are_read(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "check_files", None)
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/nowhere"):
        with pytest.raises(ConfigError, match=f"^work_dir: {place}: cannot be written: "):
            Trainer(small_config(sample, place))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "last.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="add --resume"):
        Trainer(small_config(sample, tmp_path / "old"))
    with pytest.raises(ConfigError, match="not a checkpoint"):
        Trainer(small_config(sample, tmp_path / "old"), resume=True)


def test_home_is_expanded(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Trainer(small_config(sample, "~/run"))
    run.save(["last.pt"])
    assert (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(ConfigError, match=str(tmp_path / "weights.pth")):
        Trainer(small_config(sample, "~/next", "model.pretrained=~/weights.pth"))


def things(sample, folder, paint):
    """The sample with masks of two classes, and a function that makes configurations of it."""
    shutil.copytree(sample, folder / "data")
    for path in (folder / "data" / "SegmentationClass").iterdir():
        Image.fromarray(paint(np.array(Image.open(path)) % 255 > 0).astype(np.uint8)).save(path)
    return lambda *more: small_config(folder / "data", folder / "run", "data.classes=[ground,thing]", *more)


def test_classes_without_a_label_are_refused_before_a_network_is_built(sample, tmp_path, monkeypatch, capsys):
    config = things(sample, tmp_path, lambda thing: 255 * thing)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "build_method", None)
        with pytest.raises(DataError, match=r"no pixel of thing: .* 255 \(.*ignored\); .*set data\.ids=\[0,255\]"):
            Trainer(config())
    assert re.search(r"^thing +0 +0\.0% +0$", capsys.readouterr().err, re.MULTILINE)
    Trainer(config("data.allow_absent=true"))
    Trainer(config("data.ids=[0,255]", "data.ignore=[]"))
    assert re.search(r"^thing +[1-9]\d+ +[1-9].*% +[1-9]\d+$", capsys.readouterr().err, re.MULTILINE)


def test_no_score_is_not_the_best(sample, tmp_path, capsys):
    config = things(sample, tmp_path, lambda thing: thing)
    for name in (tmp_path / "data" / "splits" / "val.txt").read_text().split():
        Image.new("L", (160, 120), 255).save(tmp_path / "data" / "SegmentationClass" / f"{name}.png")
    with pytest.raises(DataError, match=r"data\.val: no pixel of any class: .* the ids 255 \(100%, ignored\)"):
        Trainer(config())
    (tmp_path / "run.yaml").write_text(to_yaml(config("data.check=false")))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"no mean IoU, so no best.pt: no pixel of a class in the validation masks; {tmp_path / 'run' / 'last.pt'}"
    )
    assert not (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_that_was_not_looked_for_is_named_in_a_line(sample, tmp_path, capsys, workers):
    shutil.copytree(sample, tmp_path / "data")
    for path in (tmp_path / "data" / "JPEGImages").glob("unlabeled*"):
        path.write_bytes(path.read_bytes()[:400])
    config = small_config(tmp_path / "data", tmp_path / "run", f"train.workers={workers}", "data.check=false")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"corrmatch train: .*unlabeled_00\d\.jpg: not a readable image: \S.*", last)


def test_what_was_passed_over_is_said(sample, tmp_path, capsys):
    shutil.copytree(sample, tmp_path / "data")
    (tmp_path / "data" / "JPEGImages" / "._unlabeled_000.jpg").write_bytes(b"\0\5\26\7")
    Trainer(small_config(tmp_path / "data", tmp_path / "run"))
    assert "data.images: 1 files are no images, passed over: ._unlabeled_000.jpg\n" in capsys.readouterr().err


def test_learning_rates_decay_and_differ(sample, tmp_path):
    Trainer(small_config(sample, tmp_path / "run", "train.lr=0.01", "train.lr_multi=10")).run()
    lines = scalars(tmp_path / "run")
    expected = [0.01 * (1 - step / 4) ** 0.9 for step in range(4)]
    assert [line["lr_backbone"] for line in lines] == pytest.approx(expected)
    assert [line["lr_head"] for line in lines] == pytest.approx([10 * lr for lr in expected])


def test_every_parameter_is_in_one_group(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run"))
    assert [group["name"] for group in run.optimizer.param_groups] == ["backbone", "head"]
    backbone, head = ({id(p) for p in group["params"]} for group in run.optimizer.param_groups)
    assert backbone == {id(p) for p in run.method.model.backbone.parameters()}
    assert head == {id(p) for p in run.method.parameters()} - backbone


def test_the_command_on_a_folder_of_images(sample, tmp_path):
    """A folder with images, masks for some of them and a list of classes, as users have it. Two processes train."""
    folder, some = tmp_path / "data", lambda _, names: [name for name in names if name > "unlabeled_008"]
    shutil.copytree(sample / "JPEGImages", folder / "images", ignore=some)
    shutil.copytree(sample / "SegmentationClass", folder / "masks", ignore=some)
    shutil.copy(sample / "classes.txt", folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    options = [f"data.root={folder}", "work_dir=run", "train.cpu=true", *TINY]
    done = subprocess.run(
        [*launch, sys.executable, "-m", "corrmatch", "train", "folder", *options],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^mean IoU +\d+\.\d\d\n.*\nbest mean IoU \d+\.\d\d: run/best.pt$", done.stdout, re.MULTILINE)
    assert len(scalars(tmp_path / "run", "val")) == 1


def test_unlabelled_masks_are_never_read(sample, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("corrmatch.data.streams.read_mask", lambda path, table: read.append(path) or torch.zeros(9, 9))
    monkeypatch.setattr("corrmatch.data.streams.labeled_view", lambda *_: {})
    run = Trainer(small_config(sample, tmp_path / "run"))
    list(batches(Streams(run.data, run.method.streams(), run.config.train), run.config.train, 0, 4))
    assert set(read) == {item.mask for item in run.data.labeled}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "splits/labeled.txt").write_text(""), DataError, r"data\.labeled: .*labeled\.txt is empty"),
        (lambda f: (f / "JPEGImages/unlabeled_002.jpg").write_bytes(b"?"), DataError, "unlabeled_002.jpg: not a"),
        (lambda f: (f / "splits/unlabeled.txt").write_text("no_such\n"), DataError, "image of no_such"),
    ],
    ids=["empty list", "corrupt image", "unknown id"],
)
def test_bad_data_is_named_before_a_network_is_built(tmp_path, monkeypatch, damage, error, message):
    draw_sample(tmp_path / "data")
    damage(tmp_path / "data")
    monkeypatch.setattr(trainer, "build_method", None)
    with pytest.raises(error, match=message):
        Trainer(small_config(tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_unlabelled_images_are_refused(name, tmp_path):
    """Before the first phase, also those whose first phase trains on labels alone."""
    draw_sample(tmp_path / "data")
    for path in (tmp_path / "data" / "JPEGImages").glob("unlabeled_*"):
        path.unlink()
    config = small_config(tmp_path / "data", tmp_path / "run", f"method={name}", "data.unlabeled=null")
    if name == "supervised":
        assert "unlabeled" not in next(Trainer(config).loader())
        return
    with pytest.raises(ConfigError, match=f"data.unlabeled: method {name} needs unlabelled images"):
        Trainer(config)


def test_a_loss_that_is_not_finite_stops_the_run(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run", "method=supervised"))
    with torch.no_grad():
        run.method.model.decode[-1].bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        run.run()


def test_tensorboard_shows_scalars_and_images(sample, tmp_path):
    Trainer(small_config(sample, tmp_path / "run")).run()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/threshold", "train/kl", "val/miou", "val/iou_ball"} <= set(board.Tags()["scalars"])
    (tag,) = board.Tags()["images"]
    assert tag == "image 0/image, prediction, reliable, propagated, reliable after, regions, truth"
    image = board.Images(tag)[0]
    assert (image.height, image.width) == (49, 7 * 49 + 6 * 4)


@pytest.mark.parametrize("option", ["precision=bf16", "channels_last=true", "accumulate=2"])
def test_options_train(sample, tmp_path, option):
    Trainer(small_config(sample, tmp_path / "run", f"train.{option}")).run()
    assert all(math.isfinite(line["loss"]) for line in scalars(tmp_path / "run"))


def test_the_example_of_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    code = text.partition("<!-- example: head -->\n```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    assert names["propagated"].shape == (2, 21, 9, 9)
    assert names["labels"].shape == names["reliable"].shape == (2, 129, 129)


def test_the_documented_method_trains(sample, tmp_path, monkeypatch):
    """A new method needs its file and one line."""
    page = (Path(__file__).parents[1] / "docs" / "methods" / "index.md").read_text()
    code = page.partition("## Adding a method")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "pseudo_label.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "pseudo_label", importlib.import_module("pseudo_label").PseudoLabel)
    for threshold in (0.0, 0.95):
        folder = tmp_path / str(threshold)
        config = small_config(sample, folder, "method=pseudo_label", f"pseudo_label.threshold={threshold}")
        Trainer(config).run()
        assert all(math.isfinite(line["loss"]) for line in scalars(folder))
        assert all(line["s"] > 0 for line in scalars(folder)) == (threshold == 0)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ((), 4),  # 8 unlabelled images in batches of 2, 5 labelled ones
        (("train.epoch=labeled",), 3),
        (("train.epoch=unlabeled", "train.unlabeled_batch_size=4"), 2),
        (("train.unlabeled_batch_size=4",), 3),
        (("train.accumulate=2",), 2),
        (("train.epoch_steps=7",), 7),
    ],
)
def test_what_an_epoch_is(sample, tmp_path, keys, steps):
    run = Trainer(small_config(sample, tmp_path / "run", *keys))
    assert (run.epoch_steps, run.steps) == (steps, steps)
