"""Endless shuffled streams of training samples. A sample is a pure function of the seed and its position."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from corrmatch.config import TrainConfig
from corrmatch.data.datasets import Data, Item, read_image, read_mask
from corrmatch.data.maps import Maps
from corrmatch.data.views import PLAIN, WEAK_STRONG, View, labeled_view, seeded, unlabeled_views

ORDER, VIEW, PART = 0, 1, 2  # purposes of a seed


@dataclass(frozen=True)
class Stream:
    """One part of a batch.

    Attributes:
        items: The images: "labeled", "unlabeled", or "all", which is both without their labels.
        view: The views drawn of each image.
        order: Streams with different orders are shuffled and drawn independently.
        maps: Maps of these images that the run has computed, by their key in a batch.
        size: Images in a batch; None: `train.batch_size` or `train.unlabeled_batch_size`.
        part: The part of the shuffled list that is used, as shares of its length: from, to.
    """

    items: str = "unlabeled"
    view: View = WEAK_STRONG
    order: int = 1
    maps: Mapping[str, Maps] = field(default_factory=dict)
    size: int | None = None
    part: tuple[float, float] = (0.0, 1.0)


LABELED = Stream("labeled", PLAIN, 0)
UNLABELED = Stream("unlabeled", WEAK_STRONG, 1)
MIX = Stream("unlabeled", WEAK_STRONG, 2)  # unlabelled images in another order, which CutMix pastes


class Streams(Dataset[dict[str, dict[str, Tensor]]]):
    """The batches of one process by their number.

    Each pass over a stream has a new shuffled order. Position p of a stream is the same image for every batch size and
    number of processes; no two processes share a position.
    """

    def __init__(
        self, data: Data, streams: Mapping[str, Stream], train: TrainConfig, process: int = 0, processes: int = 1
    ):
        self.data, self.streams, self.crop, self.seed = data, streams, train.crop, train.seed
        self.process, self.processes = process, processes
        self.labels_until = train.labels_first * train.accumulate
        unlabeled = train.unlabeled_batch_size or train.batch_size
        usual = {name: train.batch_size if s.items == "labeled" else unlabeled for name, s in streams.items()}
        self.sizes = {name: s.size or usual[name] for name, s in streams.items()}
        unseen = [Item(item.name, item.image, None) for item in data.labeled]
        self.items = {"labeled": data.labeled, "unlabeled": data.unlabeled, "all": unseen + data.unlabeled}
        self.numbers = {name: part_of(len(self.items[s.items]), self.seed, s.part) for name, s in streams.items()}
        for stream in streams.values():
            for maps in stream.maps.values():
                maps.check(self.items[stream.items], data.classes)

    def __getitem__(self, number: int) -> dict[str, dict[str, Tensor]]:
        only_labels = number < self.labels_until  # unlabelled images would not be used
        return {
            name: self.batch(name, number)
            for name, stream in self.streams.items()
            if stream.items == "labeled" or not only_labels
        }

    def batch(self, name: str, number: int) -> dict[str, Tensor]:
        """Batch `number` of one stream."""
        size = self.sizes[name]
        first = (number * self.processes + self.process) * size
        return default_collate([self.sample(name, position) for position in range(first, first + size)])

    def sample(self, name: str, position: int) -> dict[str, Tensor]:
        """The views of one image, and its `index` in the list of the stream's images."""
        stream = self.streams[name]
        numbers = self.numbers[name]
        epoch, place = divmod(position, len(numbers))
        index = numbers[shuffled(len(numbers), self.seed, stream.order, epoch)[place]]
        item = self.items[stream.items][index]
        image = read_image(item.image)
        maps = {key: x.read(index, image.shape[1:]) for key, x in stream.maps.items()}
        with seeded(self.seed, VIEW, stream.order, position):
            if item.mask is not None:
                views = labeled_view(image, read_mask(item.mask, self.data.table), self.crop, stream.view, maps)
            else:
                views = unlabeled_views(image, self.crop, stream.view, maps)
        return views | {"index": torch.tensor(index)}


@functools.lru_cache(maxsize=8)
def shuffled(count: int, seed: int, stream: int, epoch: int) -> list[int]:
    """The shuffled order of one pass."""
    with seeded(seed, ORDER, stream, epoch):
        return torch.randperm(count).tolist()


def part_of(count: int, seed: int, part: tuple[float, float]) -> Sequence[int]:
    """The indices of the images that a stream uses: at least one."""
    if part == (0.0, 1.0):
        return range(count)
    first, last = (round(count * end) for end in part)
    first = min(first, count - 1)
    with seeded(seed, PART):
        return sorted(torch.randperm(count)[first : max(last, first + 1)].tolist())


def batches(streams: Streams, train: TrainConfig, start: int, stop: int) -> Any:
    """A loader of the batches `start` to `stop` - 1 of a run."""
    numbers: Sequence[int] = range(start, stop)
    return DataLoader(
        streams,
        batch_size=None,
        sampler=numbers,
        num_workers=train.workers,
        pin_memory=torch.cuda.is_available() and not train.cpu,
        generator=torch.Generator().manual_seed(train.seed),  # otherwise the loader uses the global generator
    )
