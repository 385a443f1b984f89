"""Which pictures there are: ids, files and checks. One way for all data sets: the configuration names the files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from corrmatch.config import DataConfig

IGNORE = 255
SHOWN = 5  # names in a message


class DataError(ValueError):
    """Data that cannot be used; the message names the files."""


@dataclass(frozen=True)
class Item:
    """A picture and, where it has one, its mask."""

    name: str
    picture: Path
    mask: Path | None


@dataclass(frozen=True)
class Data:
    """The pictures of a run and the names of the classes."""

    labeled: list[Item]
    unlabeled: list[Item]
    val: list[Item]
    classes: list[str]
    table: torch.Tensor  # (256,) uint8: the class of each id in a mask file, IGNORE, or UNKNOWN


UNKNOWN = 254  # in the table: an id that should not occur


def find_data(config: DataConfig) -> Data:
    """Resolves lists and patterns to files; whatever is missing is named at once."""
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a folder")
    pictures, masks = scan(root, "data.pictures", config.pictures), scan(root, "data.masks", config.masks)

    def listed(key: str, name: str, need_mask: bool) -> list[Item]:
        return _read_list(key, root, name, pictures, masks, need_mask)

    labeled = listed("data.labeled", config.labeled, True) if config.labeled is not None else [
        Item(name, pictures[name], masks[name]) for name in sorted(pictures.keys() & masks.keys())
    ]  # fmt: skip
    if config.val is not None:
        val = listed("data.val", config.val, True)
    else:
        val = labeled[config.val_every - 1 :: config.val_every]
    if config.labeled is None:
        held_out = {item.picture for item in val}
        labeled = [item for item in labeled if item.picture not in held_out]
    if config.unlabeled is not None:
        unlabeled = listed("data.unlabeled", config.unlabeled, False)
    else:
        taken = {item.picture for item in (*labeled, *val)}
        unlabeled = [Item(name, path, None) for name, path in sorted(pictures.items()) if path not in taken]
    for key, items in {"labeled": labeled, "val": val}.items():
        if not items:
            raise DataError(f"data.{key}: no picture with a mask in {root}")
    classes = _read_classes(config, root)
    return Data(labeled, unlabeled, val, classes, _id_table(config, len(classes)))


def scan(root: Path, key: str, pattern: str) -> dict[str, Path]:
    """Files that match a pattern such as images/{}.*, by what stands for {}."""
    prefix, mark, suffix = pattern.partition("{}")
    if not mark:
        raise DataError(f"{key}: expected a pattern with {{}} for the id, got {pattern}")
    found: dict[str, Path] = {}
    for path in sorted(root.glob(f"{prefix}**/*{suffix}")):
        name = path.relative_to(root).as_posix().removeprefix(prefix)
        name = name.rpartition(".")[0] if suffix == ".*" else name.removesuffix(suffix)
        if name in found:
            raise DataError(f"{key}: both {found[name].name} and {path.name} are there for {name}")
        found[name] = path
    return found


def _read_list(
    key: str, root: Path, name: str, pictures: dict[str, Path], masks: dict[str, Path], need_mask: bool
) -> list[Item]:
    path = root / name
    if not path.is_file():
        raise DataError(f"{key}: there is no list {path}")
    items, missing = [], []
    for line in path.read_text().splitlines():
        fields = line.split()
        if not fields:
            continue
        if len(fields) > 2:
            raise DataError(f"{key}: {path}: expected an id, or a picture and a mask, got {line!r}")
        if len(fields) == 2:
            picture, mask = root / fields[0], root / fields[1]
        else:
            picture, mask = pictures.get(fields[0], root / fields[0]), masks.get(fields[0], root / fields[0])
        missing += [f"picture of {fields[0]}"] if not picture.is_file() else []
        missing += [f"mask of {fields[0]}"] if need_mask and not mask.is_file() else []
        items.append(Item(fields[0], picture, mask if need_mask else None))
    if missing:
        raise DataError(f"{key}: {path}: not found: {shorten(missing)}")
    if not items:
        raise DataError(f"{key}: {path} is empty")
    return items


def _read_classes(config: DataConfig, root: Path) -> list[str]:
    names = config.classes
    if isinstance(names, str):
        if not (root / names).is_file():
            raise DataError(f"data.classes: expected a list of names or a file of them, there is no {root / names}")
        names = (root / names).read_text().splitlines()
    if not isinstance(names, list):
        raise DataError(f"data.classes: expected a list of names or a file of them, got {names!r}")
    names = [str(name).strip() for name in names if str(name).strip()]
    if not 2 <= len(names) < UNKNOWN:
        raise DataError(f"data.classes: expected 2 to {UNKNOWN - 1} names, got {len(names)}")
    return names


def _id_table(config: DataConfig, classes: int) -> torch.Tensor:
    ids = config.ids if config.ids is not None else list(range(classes))
    if len(ids) != classes:
        raise DataError(f"data.ids: expected an id for each of the {classes} classes, got {len(ids)}")
    wrong = [i for i in (*ids, *config.ignore) if not 0 <= i <= 255]
    if wrong:
        raise DataError(f"data.ids, data.ignore: expected 0 to 255, got {wrong[0]}")
    table = torch.full((256,), UNKNOWN, dtype=torch.uint8)
    table[config.ignore] = IGNORE
    table[ids] = torch.arange(classes, dtype=torch.uint8)
    return table


def read_picture(path: Path) -> tv_tensors.Image:
    """(3, H, W) uint8."""
    try:
        with Image.open(path) as file:
            return tv_tensors.Image(file.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's for broken files
        raise DataError(f"{path}: not a readable picture: {error}") from error


def read_mask(path: Path, table: torch.Tensor) -> tv_tensors.Mask:
    """(H, W) uint8, classes and IGNORE."""
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                raise DataError(f"{path}: expected 8-bit class ids, got a picture of mode {file.mode}")
            ids = torch.from_numpy(np.array(file))
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable mask: {error}") from error
    classes = table[ids.long()]
    if (classes == UNKNOWN).any():
        found = sorted(ids[classes == UNKNOWN].unique().tolist())
        raise DataError(f"{path}: ids {found} are neither classes nor in data.ignore")
    return tv_tensors.Mask(classes)


def check_files(data: Data) -> None:
    """Reads every picture and every mask that a run will use, and names those that are broken."""

    def problem(item: Item) -> str | None:
        try:
            picture = read_picture(item.picture)
            if item.mask is not None:
                mask = read_mask(item.mask, data.table)
                if mask.shape != picture.shape[1:]:
                    sizes = f"{tuple(mask.shape)}, its picture of {tuple(picture.shape[1:])}"
                    return f"{item.mask}: the mask is of {sizes}"
        except DataError as error:
            return str(error)
        return None

    items = [*data.labeled, *data.unlabeled, *data.val]
    with ThreadPoolExecutor() as pool:
        problems = [message for message in pool.map(problem, items) if message is not None]
    if problems:
        raise DataError(f"{len(problems)} of {len(items)} pictures cannot be used:\n  " + shorten(problems, "\n  "))


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """The first names and how many more there are."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])
