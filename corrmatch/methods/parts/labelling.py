"""Work between two phases that processes images one by one, writes a file for each, and can be resumed.

Several processes share the work. They wait for each other's files, not at a barrier: a barrier times out after some
minutes, and one process may need longer than that.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from corrmatch.data.datasets import Item, read_image
from corrmatch.data.maps import Maps
from corrmatch.data.views import normalize
from corrmatch.methods.base import Run

PAUSE = 0.2  # seconds between two checks for the files of other processes


def claim(maps: Sequence[Maps], items: Sequence[Item], run: Run) -> None:
    """The first process prepares the folders, see `Maps.claim`. The others wait for it."""
    if run.process == 0:
        for kept in maps:
            kept.claim(items, run.data.classes)
    barrier()


def over_images(
    items: Sequence[Item], files: Sequence[Path], work: Callable[[int, Tensor], None], run: Run, about: str
) -> None:
    """Calls `work` for each image without a file, in one of the processes, and waits for all files.

    Args:
        items: The images.
        files: The files that `work` writes, atomically.
        work: Takes the image's number and the image (3, H, W), normalised, on the device of the run.
        run: The run, with the number of processes and of this one.
        about: The text of the progress bar, which the first process shows.
    """
    left = [i for i in range(run.process, len(items), run.processes) if not files[i].exists()]
    images = DataLoader(
        _Images(items, left), batch_size=None, num_workers=run.config.train.workers,
        generator=torch.Generator(),  # otherwise the loader uses the global generator
    )  # fmt: skip
    done = len(range(run.process, len(items), run.processes)) - len(left)
    bar = tqdm(desc=about, total=done + len(left), initial=done, disable=None if run.process == 0 else True)
    for i, image in zip(left, images, strict=True):
        work(i, image.to(run.device, non_blocking=True))
        bar.update()
    bar.close()
    wait_for(files)


def wait_for(files: Sequence[Path]) -> None:
    """Waits until all files exist."""
    missing = [file for file in files if not file.exists()]
    while missing:
        time.sleep(PAUSE)
        missing = [file for file in missing if not file.exists()]


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def alike(*modules: nn.Module) -> None:
    """Copies the network of the first process to all: without SyncBatchNorm, batch-norm statistics differ."""
    if dist.is_available() and dist.is_initialized():
        for module in modules:
            for x in (*module.parameters(), *module.buffers()):
                dist.broadcast(x, 0)


def fingerprint(*modules: nn.Module) -> str:
    """A hash of the weights and buffers of a network."""
    digest = hashlib.sha256()
    for module in modules:
        for x in (*module.parameters(), *module.buffers()):
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Images(Dataset[Tensor]):
    """Whole images by their numbers, normalised."""

    def __init__(self, items: Sequence[Item], numbers: Sequence[int]):
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor:
        return normalize(read_image(self.items[self.numbers[place]].image))
