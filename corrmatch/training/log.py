"""What a run writes down: TensorBoard, and the same scalars as JSON lines."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as tv

from corrmatch.config import Config
from corrmatch.data.datasets import Data
from corrmatch.data.whole import Labelled
from corrmatch.methods.base import Method
from corrmatch.models.deeplab import evaluating
from corrmatch.training.evaluate import Scores
from corrmatch.training.pictures import denormalize, palette, panel


class Log:
    """Sums scalars on the device; reading them, which waits for it, is left to `write`.

    Args:
        folder: Gets `scalars.jsonl` and `tensorboard/`. What lies there from steps after `step` is dropped.
        step: Where the run starts or goes on.
    """

    def __init__(self, folder: Path, step: int):
        self.path, self.sums, self.count = folder / "scalars.jsonl", dict[str, Tensor](), 0
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() and step > 0 else []
        draft = self.path.with_suffix(".partial")
        draft.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        os.replace(draft, self.path)

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Counts one batch."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def write(self, step: int, more: dict[str, float]) -> dict[str, float]:
        """Writes the means of what was added since the last time, and `more`."""
        means = (torch.stack([value.float() for value in self.sums.values()]) / self.count).tolist()
        values = dict(zip(self.sums, means, strict=True)) | more
        self.sums, self.count = {}, 0
        self._put(step, "train", values)
        return values

    def scores(self, step: int, scores: dict[str, Scores]) -> None:
        """Writes an evaluation: all of the first network, the means of the others."""
        first, *others = scores.items()
        classes = {f"iou_{name}": value for name, value in zip(first[1].classes, first[1].iou, strict=True)}
        means = {f"miou_{name}": x.miou for name, x in others} | {f"accuracy_{name}": x.accuracy for name, x in others}
        self._put(step, "val", {"miou": first[1].miou, "accuracy": first[1].accuracy} | means | classes)

    def _put(self, step: int, kind: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")

    @torch.no_grad()
    def panels(
        self, step: int, method: Method, model: nn.Module, data: Data, config: Config, device: torch.device
    ) -> None:
        """Shows the first validation pictures, cropped, beside what the method makes of them and the truth."""
        colors, crop = palette(data.classes), config.train.crop
        pictures = Labelled(data.val[: config.eval.panels], data.table, None)
        for i in range(len(pictures)):
            image, truth = (tv.center_crop(x, [crop, crop]) for x in _with_channel(*pictures[i]))
            with evaluating(model):
                maps = method.panels(model, image.unsqueeze(0).to(device))
            shown = {name: x[0].cpu() for name, x in maps.items()}
            row = panel(denormalize(image.unsqueeze(0))[0], shown, truth[0], colors)
            self.board.add_image(f"picture {i}/{', '.join(['picture', *shown, 'truth'])}", row, step, dataformats="HWC")
        self.board.flush()


def _step_of(line: str) -> float:
    """The step of a line; of one that a stop or a full disk has cut, infinity."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, LookupError):
        return math.inf


def _with_channel(picture: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return picture, mask.unsqueeze(0)
