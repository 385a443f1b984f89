"""The log of a run: TensorBoard, the same scalars as JSON lines, and the last evaluation as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as tv

from corrmatch.config import Config
from corrmatch.data.datasets import Data
from corrmatch.data.whole import Labelled
from corrmatch.methods.base import Method
from corrmatch.models.network import evaluating
from corrmatch.training import snapshot
from corrmatch.training.evaluate import Scores
from corrmatch.training.snapshot import Panel, Snapshot
from corrmatch.training.visualization import denormalize, palette, side_by_side, views


class Log:
    """Sums scalars on the device. Only `write` reads them, because reading waits for the device.

    Args:
        folder: Gets `scalars.jsonl`, `tensorboard/`, `evaluation/`. What lies there from steps after `step` is dropped.
        step: Where the run starts or goes on.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.path = folder, folder / "scalars.jsonl"
        self.sums, self.count = dict[str, Tensor](), 0
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() and step > 0 else []
        draft = self.path.with_suffix(".partial")
        draft.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        os.replace(draft, self.path)
        kept = snapshot.read(folder) if step > 0 else None
        if kept is None or kept.step > step:
            snapshot.discard(folder)

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Adds the scalars of one batch."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def write(self, step: int, more: dict[str, float]) -> dict[str, float]:
        """Writes the means of the scalars added since the last call, and `more`."""
        means = (torch.stack([value.float() for value in self.sums.values()]) / self.count).tolist()
        values = dict(zip(self.sums, means, strict=True)) | more
        self.sums, self.count = {}, 0
        self._put(step, "train", values)
        return values

    def evaluation(
        self, step: int, scores: dict[str, Scores], method: Method, model: nn.Module, data: Data, config: Config,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Writes an evaluation: all scores of the first network, the means of the others, and panels.

        A panel is one of the first validation images, cropped, with the method's maps of it and the truth.
        """
        first, *others = scores.items()
        classes = {f"iou_{name}": value for name, value in zip(first[1].classes, first[1].iou, strict=True)}
        means = {f"miou_{name}": x.miou for name, x in others} | {f"accuracy_{name}": x.accuracy for name, x in others}
        self._put(step, "val", {"miou": first[1].miou, "accuracy": first[1].accuracy} | means | classes)
        panels = []
        for i, (name, shown) in enumerate(_panels(method, model, data, config, device)):
            row = side_by_side(list(shown.values()))
            self.board.add_image(f"image {i}/{', '.join(shown)}", row, step, dataformats="HWC")
            panels.append(Panel(name, {key: snapshot.encode(view) for key, view in shown.items()}))
        self.board.flush()
        counts = (len(data.labeled), len(data.unlabeled))
        snapshot.write(self.folder, Snapshot(step, *counts, data.classes, first[1].confusion, panels))

    def pseudo_labels(self, step: int, values: dict[str, float]) -> None:
        """Writes the quality of the pseudo-labels."""
        self._put(step, "pseudo", values)

    def _put(self, step: int, kind: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")


@torch.no_grad()
def _panels(
    method: Method, model: nn.Module, data: Data, config: Config, device: torch.device
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    colors, crop = palette(data.classes), config.train.crop
    items = data.val[: config.eval.panels]
    images = Labelled(items, data.table, None)
    for i, item in enumerate(items):
        image, truth = (tv.center_crop(x, [crop, crop]) for x in _with_channel(*images[i]))
        with evaluating(model):
            maps = method.panels(model, image.unsqueeze(0).to(device))
        shown = {name: x[0].cpu() for name, x in maps.items()}
        yield item.name, views(denormalize(image.unsqueeze(0))[0], shown, truth[0], colors)


def _step_of(line: str) -> float:
    """The step of a line; infinity if the line is incomplete, after a crash or on a full disk."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, LookupError):
        return math.inf


def _with_channel(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return image, mask.unsqueeze(0)
