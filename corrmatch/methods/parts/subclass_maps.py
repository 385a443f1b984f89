"""Subclasses of labelled images: a network's features, clustered class by class, and a label map for each image.

This is work between two phases. Each image and each class has a file once it is done, so that an interrupted run
continues with the next one, and several processes can share the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from corrmatch.data.datasets import IGNORE, Data, DataError, Item, read_mask
from corrmatch.data.images import decode_image
from corrmatch.data.maps import Maps, atomically, discard, save_array
from corrmatch.data.views import mirrored
from corrmatch.methods.base import Run
from corrmatch.methods.parts.clustering import balanced_kmeans
from corrmatch.methods.parts.labelling import alike, barrier, claim, fingerprint, over_images, wait_for
from corrmatch.methods.parts.pseudo_labels import nearest
from corrmatch.models.network import Network, enlarge, evaluating

WORK = "work"  # the folder of temporary files
STRIDE = 8  # of the features that are clustered
HALF_MAX = 65_504.0  # the largest float16


def subclass_maps(folder: Path, network: Network, counts: Sequence[int], seed: int, sample: int) -> Maps:
    """The label maps of a run, which depend on the numbers of subclasses and on the network."""
    facts = {"counts": list(counts), "baseline": fingerprint(network), "seed": seed, "sample": sample}
    return Maps(folder / "subclasses", facts)


def make_subclasses(network: Network, run: Run, counts: Sequence[int] | None, *, most: int, sample: int) -> list[int]:
    """Divides the classes of the labelled images, writes their label maps, and returns the number of subclasses.

    Args:
        network: Computes the features. The network of the first process is copied to all.
        run: The run; the maps are written into its folder. Temporary files are removed at the end.
        counts: Subclasses of each class; None: those of `by_share`.
        most: See `by_share`.
        sample: See `balanced_kmeans`.
    """
    alike(network)
    items, classes = run.data.labeled, run.data.classes
    labels = [shrunk(item, run.data) for item in items]
    pixels = np.stack([np.bincount(x[x != IGNORE], minlength=len(classes)) for x in labels])
    there = pixels.sum(0).tolist()
    counts = by_share(pixels.sum(0), most) if counts is None else list(counts)
    for name, count, positions in zip(classes, counts, there, strict=True):
        if count > max(1, positions):
            raise DataError(f"subclass.counts: {name} has {positions} positions, too few for {count} subclasses")
    maps = subclass_maps(run.folder, network, counts, run.config.train.seed, sample)
    claim([maps], items, run)
    if not all(path.exists() for path in maps.paths(items)):
        Work(maps, counts, labels, pixels, run).do(network, sample)
    barrier()
    if run.process == 0:
        discard(maps.folder / WORK)
    return counts


def by_share(pixels: np.ndarray, most: int) -> list[int]:
    """max(1, round(n_c / u)) for pixels (C,): u is the median of the classes present, or more, for `most` in all."""
    unit = float(np.median(pixels[pixels > 0])) if pixels.any() else 1.0
    while True:
        counts = np.maximum(1, np.floor(pixels / unit + 0.5)).astype(int)
        if counts.sum() <= most:
            return counts.tolist()
        unit *= 1.01


def shrunk(item: Item, data: Data) -> np.ndarray:
    """The labels of an image at stride 8, by `nearest`."""
    if item.mask is None:
        raise ValueError(f"{item.name} has no mask")
    labels = read_mask(item.mask, data.table).as_subclass(Tensor)
    return nearest(labels.unsqueeze(0), [-(-side // STRIDE) for side in labels.shape])[0].numpy()


class Work:
    """The steps of the work: features on disk, clusters, label maps.

    Attributes:
        folder: Temporary files: for each class that is divided a file of points, filled image by image.
        first: (I + 1, C), the first point of each image among those of its class.
        divided: Classes with more than one subclass; the slowest to cluster come first.
    """

    def __init__(self, maps: Maps, counts: list[int], labels: list[np.ndarray], pixels: np.ndarray, run: Run):
        self.maps, self.counts, self.labels, self.run = maps, counts, labels, run
        self.folder = maps.folder / WORK
        self.first = np.concatenate([np.zeros_like(pixels[:1]), pixels.cumsum(0)])
        self.divided = [c for c, count in enumerate(counts) if count > 1]
        self.divided.sort(key=lambda c: -counts[c] * int(self.first[-1, c]))

    def do(self, network: Network, sample: int) -> None:
        """Does all the work that is not done yet."""
        run, items = self.run, self.run.data.labeled
        points = {c: self.folder / f"points_{c}.npy" for c in self.divided}
        clusters = [self.folder / f"clusters_{c}.npy" for c in self.divided]
        done = [self.folder / f"{i:06}.done" for i in range(len(items))]
        if run.process == 0:
            self._lay_out(points, network.classifier.in_channels)
        wait_for([*points.values()])

        def extract(i: int, image: Tensor) -> None:
            found = features(network, image, self.labels[i].shape)
            for c, path in points.items():
                rows = np.load(path, mmap_mode="r+")
                rows[self.first[i, c] : self.first[i + 1, c]] = found[self.labels[i] == c]
                rows.flush()
            done[i].touch()

        def cluster(place: int) -> None:
            c = self.divided[place]
            rng = np.random.default_rng([run.config.train.seed, c])
            found = balanced_kmeans(np.load(points[c], mmap_mode="r"), self.counts[c], rng, sample=sample)
            atomically(clusters[place], lambda draft: save_array(draft, found.astype(np.uint8)))

        over_images(items, done, extract, run, "features")
        each(clusters, cluster, run, "clusters")
        found = {c: np.load(path, mmap_mode="r") for c, path in zip(self.divided, clusters, strict=True)}
        each(self.maps.paths(items), lambda i: self.maps.write(i, self._drawn(i, found)), run, "label maps")

    def _lay_out(self, points: dict[int, Path], channels: int) -> None:
        self.folder.mkdir(exist_ok=True)
        for c, path in points.items():
            make = functools.partial(
                np.lib.format.open_memmap, mode="w+", dtype=np.float16, shape=(int(self.first[-1, c]), channels)
            )
            if not path.exists():
                atomically(path, make)

    def _drawn(self, i: int, clusters: dict[int, np.ndarray]) -> np.ndarray:
        small = np.full(self.labels[i].shape, IGNORE, np.uint8)
        for c in range(len(self.counts)):
            within = clusters[c][self.first[i, c] : self.first[i + 1, c]] if c in clusters else 0
            small[self.labels[i] == c] = sum(self.counts[:c]) + within
        size = decode_image(self.run.data.labeled[i].image).size[::-1]
        return nearest(torch.from_numpy(small).unsqueeze(0), size)[0].numpy()


@torch.no_grad()
def features(network: Network, image: Tensor, size: Sequence[int]) -> np.ndarray:
    """Features (h, w, D) float16 of an image (3, H, W) at stride 8. The image is mirrored to a multiple of 8."""
    padded = mirrored(image, [-(-side // STRIDE) * STRIDE for side in image.shape[1:]])
    with evaluating(network):
        found = network(padded.unsqueeze(0), features=True).features
    return enlarge(found, size)[0].clamp(max=HALF_MAX).movedim(0, -1).half().cpu().numpy()


def each(files: Sequence[Path], work: Callable[[int], None], run: Run, about: str) -> None:
    """Calls `work` for each missing file, in one of the processes, and waits for all files."""
    mine = range(run.process, len(files), run.processes)
    for i in tqdm(mine, about, disable=None if run.process == 0 else True):
        if not files[i].exists():
            work(i)
    wait_for(files)
