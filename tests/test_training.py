"""The loop: what a step does, resuming, several processes, every shipped configuration."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_config import CONFIGS
from torch import nn
from training import TINY, scalars, shorten, small_config

from corrmatch.config import CHOICES, ConfigError
from corrmatch.data.datasets import DataError
from corrmatch.data.sample import draw_sample
from corrmatch.data.streams import Streams, batches
from corrmatch.training import checkpoint, methods, trainer
from corrmatch.training.methods import METHODS
from corrmatch.training.trainer import Trainer


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Four steps an epoch."""
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder)
    shorten(folder, labeled=5, unlabeled=8, val=3)
    return folder


@pytest.fixture(autouse=True)
def fresh_process():
    """As each command has it: accelerate keeps its settings for the life of a process. Memory is not filled, which
    slows a network several times down."""
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_configuration_trains(sample, tmp_path, name):
    config = small_config(sample, tmp_path / "run", name=name)
    run = Trainer(config)
    run.steps = 2
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


RESUMED = ("train.ema=0.9", "train.epochs=2", "train.save_every=3", "train.eval_every=2")


def test_kill_and_resume_is_bit_for_bit_an_uninterrupted_run(sample, tmp_path, monkeypatch):
    whole = small_config(sample, tmp_path / "whole", *RESUMED)
    Trainer(whole).run()

    halves = small_config(sample, tmp_path / "halves", *RESUMED)
    killed = Trainer(halves)
    advance = killed.advance

    def die_in_step_six(loader):
        if killed.step == 5:
            raise KeyboardInterrupt
        advance(loader)

    monkeypatch.setattr(killed, "advance", die_in_step_six)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert scalars(tmp_path / "halves")[-1]["step"] == 5
    for scramble in (torch.manual_seed, random.seed, np.random.seed):
        scramble(12345)
    resumed = Trainer(halves, resume=True)
    assert resumed.step == 3
    resumed.run()

    for kind in ("train", "val"):
        assert scalars(tmp_path / "halves", kind) == scalars(tmp_path / "whole", kind)
    ends = [checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "halves")]
    for content in ends:
        content.pop("config")
    assert ends[0]["step"] == 8
    assert_equal(*ends)


def assert_equal(a, b, path=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def test_a_checkpoint_holds_what_it_should(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run", "train.ema=0.9"))
    run.run()
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    assert {"config", "classes", "step", "best", "method", "optimizer", "schedule", "ema", "random"} == set(content)
    assert content["method"]["theta.threshold"] == run.method.theta.threshold != 0.5
    averaged = content["ema"]["module.backbone.conv1.0.weight"]
    assert not torch.equal(averaged, content["method"]["model.backbone.conv1.0.weight"])


def test_resume_refuses_other_settings_and_a_new_run_an_old_folder(sample, tmp_path):
    Trainer(small_config(sample, tmp_path / "run")).save(["last.pt"])
    with pytest.raises(ConfigError, match=r"train\.lr: the run to be resumed had 0\.05, not 0\.1"):
        Trainer(small_config(sample, tmp_path / "run", "train.lr=0.1"), resume=True)
    with pytest.raises(ConfigError, match="add --resume"):
        Trainer(small_config(sample, tmp_path / "run"))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        Trainer(small_config(sample, tmp_path / "other"), resume=True)
    Trainer(small_config(sample, tmp_path / "run", "train.log_every=7"), resume=True)


def test_learning_rates_decay_and_differ(sample, tmp_path):
    Trainer(small_config(sample, tmp_path / "run", "train.lr=0.01", "train.lr_multi=10")).run()
    lines = scalars(tmp_path / "run")
    expected = [0.01 * (1 - step / 4) ** 0.9 for step in range(4)]
    assert [line["lr_backbone"] for line in lines] == pytest.approx(expected)
    assert [line["lr_head"] for line in lines] == pytest.approx([10 * lr for lr in expected])


def test_every_parameter_is_in_one_group(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run"))
    backbone, head = ({id(p) for p in group["params"]} for group in run.optimizer.param_groups)
    assert backbone == {id(p) for p in run.method.model.backbone.parameters()}
    assert head == {id(p) for p in run.method.parameters()} - backbone


def test_accumulated_batches_are_one_large_batch(sample, tmp_path, monkeypatch):
    """Where no layer looks at the batch as a whole."""
    monkeypatch.setattr(trainer, "build_method", build_without_batch_effects)
    weights = []
    for name, batch, accumulate in (("large", 4, 1), ("small", 2, 2)):
        overrides = (f"train.batch_size={batch}", f"train.accumulate={accumulate}", "method=supervised")
        run = Trainer(small_config(sample, tmp_path / name, *overrides))
        ignore_nothing(run)
        run.steps = 2
        run.run()
        weights.append(run.method.model.decode[-1].weight)
    torch.testing.assert_close(weights[0], weights[1])


def build_without_batch_effects(config, num_classes):
    """The method with batch norms and dropouts that leave the values as they are."""
    method = methods.build_method(config, num_classes)
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.Dropout2d):
                setattr(module, name, nn.Identity())
    return method


def ignore_nothing(run):
    """Ignored pixels, of which each batch has its own number, become class 0."""
    forward = run.method.forward

    def without_ignored(batch, generator):
        batch["labeled"]["label"][batch["labeled"]["label"] == 255] = 0
        for name in batch.keys() - {"labeled"}:
            batch[name]["ignore"][:] = False
        return forward(batch, generator)

    run.method.forward = without_ignored


def train_without_batch_effects(data, folder, batch):
    """Both methods, one after the other."""
    torch.set_num_threads(1)
    for method in METHODS:
        overrides = (f"method={method}", f"train.batch_size={batch}", "train.cpu=true", "train.lr=0.01")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_method", build_without_batch_effects)
            run = Trainer(small_config(data, folder / method, *overrides))
        ignore_nothing(run)
        run.steps = 2
        run.run()


def test_two_processes_are_one_with_the_doubled_batch(sample, tmp_path):
    """Where no layer looks at the batch as a whole; the three validation pictures are not divisible by two."""
    script = tmp_path / "two.py"
    call = f"train_without_batch_effects({str(sample)!r}, Path({str(tmp_path / 'two')!r}), 2)"
    script.write_text(f"from pathlib import Path\nfrom test_training import *\n{call}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    train_without_batch_effects(sample, tmp_path / "one", 4)
    for method in METHODS:
        one, two = (tmp_path / name / method for name in ("one", "two"))
        ends = [checkpoint.load(folder / "last.pt") for folder in (one, two)]
        assert [len(content["random"]) for content in ends] == [1, 2]
        for name, expected in ends[0]["method"].items():
            torch.testing.assert_close(ends[1]["method"][name], expected, rtol=1e-4, atol=1e-6)
        for kind in ("miou", "accuracy"):
            assert scalars(two, "val")[0][kind] == pytest.approx(scalars(one, "val")[0][kind])


def test_the_command_on_a_folder_of_pictures(sample, tmp_path):
    """As people have them: pictures, masks for some of them, a list of classes; by two processes."""
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
    list(batches(Streams(run.data, run.method.streams, 49, 0), run.config.train, 0, 4, 0, 1))
    assert set(read) == {item.mask for item in run.data.labeled}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "splits/labeled.txt").write_text(""), DataError, r"data\.labeled: .*labeled\.txt is empty"),
        (lambda f: (f / "JPEGImages/unlabeled_002.jpg").write_bytes(b"?"), DataError, "unlabeled_002.jpg: not a"),
        (lambda f: (f / "splits/unlabeled.txt").write_text("no_such\n"), DataError, "picture of no_such"),
    ],
    ids=["empty list", "corrupt picture", "unknown id"],
)
def test_bad_data_is_named_before_a_network_is_built(tmp_path, monkeypatch, damage, error, message):
    draw_sample(tmp_path / "data")
    damage(tmp_path / "data")
    monkeypatch.setattr(trainer, "build_method", None)
    with pytest.raises(error, match=message):
        Trainer(small_config(tmp_path / "data", tmp_path / "run"))


def test_corrmatch_without_unlabelled_pictures_is_refused(tmp_path):
    draw_sample(tmp_path / "data")
    for path in (tmp_path / "data" / "JPEGImages").glob("unlabeled_*"):
        path.unlink()
    config = small_config(tmp_path / "data", tmp_path / "run", "data.unlabeled=null")
    with pytest.raises(ConfigError, match="needs unlabelled pictures"):
        Trainer(config)


def test_a_loss_that_is_not_finite_stops_the_run(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run", "method=supervised"))
    with torch.no_grad():
        run.method.model.decode[-1].bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        run.run()


def test_tensorboard_shows_scalars_and_pictures(sample, tmp_path):
    Trainer(small_config(sample, tmp_path / "run")).run()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/threshold", "train/kl", "val/miou", "val/iou_ball"} <= set(board.Tags()["scalars"])
    (tag,) = board.Tags()["images"]
    assert tag == "picture 0/picture, prediction, reliable, propagated, reliable after, regions, truth"
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
    """A new method needs a class and its name, and no change of the loop."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    code = text.partition("## Adding a method")[2].partition("```python\n")[2].partition("```")[0]
    exec("from __future__ import annotations\n" + code, vars(methods))
    monkeypatch.setitem(METHODS, "pseudo_label", methods.PseudoLabel)
    monkeypatch.delattr(methods, "PseudoLabel")
    monkeypatch.setitem(CHOICES, "method", (*CHOICES["method"], "pseudo_label"))
    Trainer(small_config(sample, tmp_path / "run", "method=pseudo_label")).run()
    assert all(math.isfinite(line["loss"]) for line in scalars(tmp_path / "run"))
