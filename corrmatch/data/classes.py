"""Counts the labelled pixels of each class and refuses data from which a class cannot be learnt."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from corrmatch.data.datasets import Data, Pixels, read_mask
from corrmatch.data.files import shorten
from corrmatch.data.images import IGNORE, DataError

MUCH = 0.5  # the share of ignored pixels above which there is a warning


def table(data: Data, pixels: Pixels) -> str:
    """A table of the pixels of each class in labelled and validation masks, with a warning if many are ignored."""
    labeled, val = (_by_class(data, pixels[name]) for name in ("labeled", "val"))
    rows = [*enumerate(data.classes), (IGNORE, "ignored")]
    width = max(len(name) for _, name in rows)
    lines = [f"{'pixels':<{width}}  {'labelled':>12}  {'share':>6}  {'validation':>12}"]
    for c, name in rows:
        share = labeled[c] / max(1, labeled.sum())
        lines.append(f"{name:<{width}}  {labeled[c]:>12}  {share:>6.1%}  {val[c]:>12}")
    if labeled[IGNORE] > MUCH * labeled.sum():
        lines.append(f"warning: {labeled[IGNORE] / labeled.sum():.0%} of the labelled pixels are ignored (data.ignore)")
    return "\n".join(lines)


def require_labels(data: Data, pixels: Pixels) -> None:
    """Raises DataError for classes without a labelled pixel: they cannot be learnt."""
    count = _by_class(data, pixels["labeled"])
    absent = [name for c, name in enumerate(data.classes) if count[c] == 0]
    if absent:
        raise DataError(
            f"data.labeled: no pixel of {shorten(absent)}: {_ids(data, pixels['labeled'])}; "
            "data.allow_absent=true trains nevertheless"
        )


def require_truth(data: Data, pixels: Pixels) -> None:
    """Raises DataError if no pixel of the validation masks has a class."""
    if _by_class(data, pixels["val"])[: len(data.classes)].sum() == 0:
        raise DataError(f"data.val: no pixel of any class: {_ids(data, pixels['val'])}")


def labelled_pixels(data: Data) -> Tensor:
    """The labelled pixels of each class (C,) in the labelled images, which it reads."""
    counts = torch.zeros(IGNORE + 1, dtype=torch.int64)
    for item in data.labeled:
        if item.mask is not None:
            counts += read_mask(item.mask, data.table).as_subclass(Tensor).flatten().bincount(minlength=IGNORE + 1)
    return counts[: len(data.classes)]


def log_frequencies(data: Data) -> Tensor:
    """The logarithm of each class's share of the labelled pixels (C,), which it reads. 0 for a class without any."""
    counts = labelled_pixels(data).double()
    return torch.where(counts > 0, counts.clamp(min=1).log() - counts.sum().clamp(min=1).log(), 0.0).float()


def _by_class(data: Data, pixels: np.ndarray) -> np.ndarray:
    count = np.zeros(256, np.int64)
    np.add.at(count, data.table.numpy(), pixels)
    return count


def _ids(data: Data, pixels: np.ndarray) -> str:
    """The ids that the masks contain."""
    present = np.flatnonzero(pixels).tolist()
    shares = [f"{i} ({pixels[i] / pixels.sum():.0%}{', ignored' if data.table[i] == IGNORE else ''})" for i in present]
    text = f"the masks hold the ids {shorten(shares)}"
    if present == [0, 255] and data.table[255] == IGNORE:
        text += "; where 255 is a class, as in black and white masks, set data.ids=[0,255] data.ignore=[]"
    return text
