"""Endless shuffled streams of training samples, each a pure function of the seed and its position."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from corrmatch.config import TrainConfig
from corrmatch.data.datasets import Data, Item, read_mask, read_picture
from corrmatch.data.views import labeled_view, seeded, unlabeled_views

STREAMS = ("labeled", "unlabeled", "mix")  # mix: unlabelled pictures in another order, which CutMix pastes
ORDER, VIEW = 0, 1  # what a seed is for


class Streams(Dataset[dict[str, dict[str, Tensor]]]):
    """Position p of every stream: the p-th picture of an order that is shuffled anew for each pass."""

    def __init__(self, data: Data, names: tuple[str, ...], crop: int, seed: int):
        self.data, self.names, self.crop, self.seed = data, names, crop, seed

    def __getitem__(self, position: int) -> dict[str, dict[str, Tensor]]:
        return {name: self.sample(name, position) for name in self.names}

    def sample(self, name: str, position: int) -> dict[str, Tensor]:
        """The views of one picture."""
        stream = STREAMS.index(name)
        items = self.data.labeled if name == "labeled" else self.data.unlabeled
        epoch, place = divmod(position, len(items))
        item: Item = items[shuffled(len(items), self.seed, stream, epoch)[place]]
        picture = read_picture(item.picture)
        with seeded(self.seed, VIEW, stream, position):
            if item.mask is not None:
                return labeled_view(picture, read_mask(item.mask, self.data.table), self.crop)
            return unlabeled_views(picture, self.crop)


@functools.lru_cache(maxsize=8)
def shuffled(count: int, seed: int, stream: int, epoch: int) -> list[int]:
    """The order of a pass."""
    with seeded(seed, ORDER, stream, epoch):
        return torch.randperm(count).tolist()


class Positions(Sampler[list[int]]):
    """The positions of the batches `start` to `stop` of one process; no two processes share one."""

    def __init__(self, start: int, stop: int, batch_size: int, process: int, processes: int):
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.stop):
            first = (batch * self.processes + self.process) * self.batch_size
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        return self.stop - self.start


def batches(streams: Streams, train: TrainConfig, start: int, stop: int, process: int, processes: int) -> Any:
    """A loader of the batches `start` to `stop` of a run, for one of its processes."""
    return DataLoader(
        streams,
        batch_sampler=Positions(start, stop, train.batch_size, process, processes),
        num_workers=train.workers,
        pin_memory=torch.cuda.is_available() and not train.cpu,
        generator=torch.Generator().manual_seed(train.seed),  # else the loader draws a number from the global one
    )
