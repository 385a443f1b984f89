"""Helpers of the trainer's tests: a drawn sample and a configuration small enough for a test."""

from __future__ import annotations

import json

from corrmatch.config import load_config

TINY = (
    "model.backbone=test_resnet", "model.pretrained=false", "model.output_stride=16", "model.channels=16",
    "train.crop=49", "train.batch_size=2", "train.workers=0", "train.log_every=1", "train.epochs=1",
    "eval.panels=1", "corrmatch.num_masks=8",
)  # fmt: skip
SMALL = (
    *TINY, "data.pictures=JPEGImages/{}.jpg", "data.masks=SegmentationClass/{}.png",
    "data.classes=classes.txt", "data.labeled=splits/labeled.txt", "data.unlabeled=splits/unlabeled.txt",
    "data.val=splits/val.txt", "data.ids=null", "data.ignore=[255]", "eval.window=65", "eval.stride=43",
)  # fmt: skip


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
