"""Finds and checks the files of a data set. The configuration names them; all data sets are handled alike."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from corrmatch.config import DataConfig
from corrmatch.data.files import Found, Item, read_lines, read_list, scan, shorten
from corrmatch.data.images import (
    IGNORE,
    UNKNOWN,
    DataError,
    decode_image,
    read_ids,
    read_image,
    read_mask,
    unknown_ids,
)
from corrmatch.paths import expand

__all__ = ["IGNORE", "Data", "DataError", "Item", "check_files", "find_data", "read_image", "read_mask"]

Pixels = dict[str, np.ndarray]  # for "labeled" and "val": the pixels (256,) of each id in the masks


@dataclass(frozen=True)
class Data:
    """The images of a run and the names of the classes."""

    labeled: list[Item]
    unlabeled: list[Item]
    val: list[Item]
    classes: list[str]
    table: torch.Tensor  # (256,) uint8: the class of each id in a mask file, IGNORE, or UNKNOWN
    notes: tuple[str, ...] = ()  # messages for the user, one line each
    withheld: tuple[Item, ...] = ()  # unlabelled images with their masks, which only `eval.pseudo_labels` uses


def find_data(config: DataConfig) -> Data:
    """Resolves lists and patterns to files. Raises one DataError that names everything that is missing.

    No image of `val` is in `labeled`. Images that `val_every` holds out are in neither of the other two.
    """
    root = expand(config.root)
    if not config.root or not os.path.isdir(root):
        raise DataError(f"data.root: {root} is not a folder")
    masks = scan(root, "data.masks", config.masks)
    images = scan(root, "data.images", config.images, apart=masks.files.values())
    lists = {
        key: read_list(f"data.{key}", root, name, images, masks, need_mask=key != "unlabeled")
        for key in ("labeled", "val", "unlabeled")
        if (name := getattr(config, key)) is not None
    }
    notes = [*images.note(), *masks.note()]
    labeled = lists.get("labeled") or _with_masks(root, images, masks)
    val = lists.get("val") or _every(config.val_every, labeled)
    held_out = {item.image for item in val}
    both = [item.name for item in labeled if item.image in held_out]
    if both and "labeled" in lists and "val" in lists:
        raise DataError(f"data.labeled, data.val: images in both lists: {shorten(both)}")
    labeled = [item for item in labeled if item.image not in held_out]
    if not labeled:
        raise DataError("data.labeled: every image with a mask is in data.val")
    taken = held_out | {item.image for item in labeled}
    unlabeled = lists.get("unlabeled") or [
        Item(name, path, masks.files.get(name)) for name, path in sorted(images.files.items()) if path not in taken
    ]
    both = [item.name for item in unlabeled if item.image in held_out]
    if both and "val" in lists:
        notes.append(f"data.unlabeled: {len(both)} images are in data.val as well: {shorten(both)}")
    elif both:
        unlabeled = [item for item in unlabeled if item.image not in held_out]
    withheld = tuple(item for item in unlabeled if item.mask is not None and item.image not in taken)
    unlabeled = [replace(item, mask=None) for item in unlabeled]
    classes = _read_classes(config, root)
    return Data(labeled, unlabeled, val, classes, _id_table(config, len(classes)), tuple(notes), withheld)


def _with_masks(root: Path, images: Found, masks: Found) -> list[Item]:
    names = sorted(images.files.keys() & masks.files.keys())
    if not names:
        there = (f"{len(found.files)} files match {found.pattern}" for found in (images, masks))
        notes = (*images.note(), *masks.note())
        raise DataError("; ".join([f"data.labeled: no image with a mask in {root}", *there, *notes]))
    return [Item(name, images.files[name], masks.files[name]) for name in names]


def _every(step: int, labeled: list[Item]) -> list[Item]:
    if len(labeled) < step:
        raise DataError(
            f"data.val: {len(labeled)} images have a mask, too few to hold out every {step}th; "
            "set data.val_every, or list images in data.val"
        )
    return labeled[step - 1 :: step]


def _read_classes(config: DataConfig, root: Path) -> list[str]:
    names = config.classes
    if isinstance(names, str):
        path = root / expand(names)
        if not os.path.isfile(path):
            raise DataError(f"data.classes: expected a list of names or a file of them, there is no {path}")
        names = read_lines("data.classes", path)
    if not isinstance(names, list):
        raise DataError(f"data.classes: expected a list of names or a file of them, got {names!r}")
    others = [name for name in names if not isinstance(name, str)]
    if others:  # YAML reads no, on and 1 as other types
        raise DataError(f"data.classes: expected names, got {others[0]!r}; put such a name in quotes")
    names = [name.strip() for name in names if name.strip()]
    if not 2 <= len(names) < UNKNOWN:
        raise DataError(f"data.classes: expected 2 to {UNKNOWN - 1} names, got {len(names)}")
    _refuse_repeated("data.classes", names)
    return names


def _id_table(config: DataConfig, classes: int) -> torch.Tensor:
    ids = config.ids if config.ids is not None else list(range(classes))
    if len(ids) != classes:
        raise DataError(f"data.ids: expected an id for each of the {classes} classes, got {len(ids)}")
    wrong = [i for i in (*ids, *config.ignore) if not 0 <= i <= 255]
    if wrong:
        raise DataError(f"data.ids, data.ignore: expected 0 to 255, got {wrong[0]}")
    _refuse_repeated("data.ids", ids)
    both = sorted(set(ids) & set(config.ignore))
    if both:
        raise DataError(f"data.ids, data.ignore: {both[0]} is the id of a class and ignored")
    table = torch.full((256,), UNKNOWN, dtype=torch.uint8)
    table[config.ignore] = IGNORE
    table[ids] = torch.arange(classes, dtype=torch.uint8)
    return table


def _refuse_repeated(key: str, values: list[str] | list[int]) -> None:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise DataError(f"{key}: more than once: {shorten(twice)}")


def check_files(data: Data) -> Pixels:
    """Reads every image and mask that a run will use. Raises DataError with the names of broken ones.

    Returns how many pixels of each id the masks of `labeled` and `val` have.
    """
    items = [*data.labeled, *data.val, *data.unlabeled]
    table = data.table.numpy()

    def count(item: Item) -> np.ndarray | DataError | None:
        try:
            return _count(item, table)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(count, items))
    problems = [str(found) for found in counts if isinstance(found, DataError)]
    if problems:
        raise DataError(f"{len(problems)} of {len(items)} images cannot be used:\n  " + shorten(problems, "\n  "))
    known, none = [found for found in counts if isinstance(found, np.ndarray)], np.zeros(256, np.int64)
    labeled = len(data.labeled)
    return {"labeled": sum(known[:labeled], none), "val": sum(known[labeled:], none)}


def _count(item: Item, table: np.ndarray) -> np.ndarray | None:
    width, height = decode_image(item.image).size
    if item.mask is None:
        return None
    ids = read_ids(item.mask)
    if ids.shape != (height, width):
        turned = "; both are taken as their EXIF orientation shows them" if ids.shape == (width, height) else ""
        raise DataError(f"{item.mask}: the mask is of {ids.shape}, its image of {(height, width)}{turned}")
    pixels = np.bincount(ids.ravel(), minlength=256)
    if pixels[table == UNKNOWN].any():
        raise unknown_ids(item.mask, np.flatnonzero((pixels > 0) & (table == UNKNOWN)))
    return pixels
