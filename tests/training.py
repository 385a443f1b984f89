"""Helpers of the trainer's tests: a drawn sample, a configuration for tests, runs that end early."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from corrmatch.config import load_config
from corrmatch.data.maps import Maps
from corrmatch.methods import build_method
from corrmatch.training import checkpoint
from corrmatch.training.trainer import Trainer

TINY = (
    "model.backbone=test_resnet", "model.pretrained=false", "model.output_stride=16", "model.channels=16",
    "model.multi_grid=[]", "forgetting.labeled=[1]", "subclass.counts=null",
    "train.crop=49", "train.batch_size=2", "train.workers=0", "train.log_every=1", "train.epochs=1",
    "eval.panels=1", "propagation.num_masks=8",
)  # fmt: skip
SMALL = (
    *TINY, "data.images=JPEGImages/{}.jpg", "data.masks=SegmentationClass/{}.png",
    "data.classes=classes.txt", "data.labeled=splits/labeled.txt", "data.unlabeled=splits/unlabeled.txt",
    "data.val=splits/val.txt", "data.ids=null", "data.ignore=[255]", "eval.window=65", "eval.stride=43",
)  # fmt: skip
VIT = ("model.decoder=dpt", "model.backbone=test_vit")  # timm's smallest; no crop of 49 is a multiple of its patches


def small_config(data, work_dir, *overrides, name="sample"):
    return load_config(name, [f"data.root={data}", f"work_dir={work_dir}", *SMALL, *overrides])


def scalars(folder, kind="train"):
    lines = map(json.loads, (folder / "scalars.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def shorten(folder, **counts):
    """Keeps the first entries of the sample's lists."""
    for name, count in counts.items():
        path = folder / "splits" / f"{name}.txt"
        path.write_text("\n".join(path.read_text().splitlines()[:count]) + "\n")


def stop_after(run, steps):
    run.steps, run.ends = steps, [steps]


def die_in_step(run, step, monkeypatch):
    """Runs until this step begins. Then the state of all random generators is changed."""
    advance = run.advance

    def advance_or_die(loader):
        if run.step == step - 1:
            raise KeyboardInterrupt
        advance(loader)

    monkeypatch.setattr(run, "advance", advance_or_die)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    for scramble in (torch.manual_seed, random.seed, np.random.seed):
        scramble(12345)


def run_killed_while_writing(config, limits, steps, monkeypatch):
    """Runs to the end, killed after so many maps and resumed at one of `steps`. Returns the maps in their order."""
    written, write = [], Maps.write

    def write_or_die(limit):
        def counted(maps, index, values):
            if len(written) == limit:
                raise KeyboardInterrupt
            write(maps, index, values)
            written.append(maps.path(index))

        return counted

    run = Trainer(config)
    for limit in limits:
        monkeypatch.setattr(Maps, "write", write_or_die(limit))
        with pytest.raises(KeyboardInterrupt):
            run.run()
        torch.manual_seed(999)
        run = Trainer(config, resume=True)
        assert run.step in steps
    monkeypatch.setattr(Maps, "write", write_or_die(None))
    run.run()
    return written


def assert_same_end(folder, *others):
    """Asserts that runs ended with the same bits, whatever their configurations, and logged the same."""
    ends = [checkpoint.load(path / "last.pt") for path in (folder, *others)]
    for end in ends:
        end.pop("config")
    for other, end in zip(others, ends[1:], strict=True):
        assert_same(ends[0], end)
        assert scalars(other) == scalars(folder)


def build_without_batch_effects(config, num_classes, **options):
    """Builds the method with norms and dropouts that do not change the values."""
    method = build_method(config, num_classes, **options)
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.Dropout2d):
                setattr(module, name, nn.Identity())
    return method


def count_everything(run):
    """Changes ignored pixels, whose number differs between batches, to class 0."""
    forward = run.method.forward

    def without_ignored(batch, progress):
        for part in batch.values():
            for name in part.keys() & {"label", "pseudo"}:
                part[name][part[name] == 255] = 0
            if "ignore" in part:
                part["ignore"][:] = False
        return forward(batch, progress)

    run.method.forward = without_ignored


def assert_same(a, b, path=""):
    """Asserts that two nested structures have the same bits."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path
