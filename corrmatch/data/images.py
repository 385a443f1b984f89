"""Reading images and masks."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision import tv_tensors

IGNORE = 255
UNKNOWN = 254  # the class of an id that is neither a class nor ignored

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # modes that convert to RGB as seen
SPREAD = {"L;2": np.uint8(85), "L;4": np.uint8(17)}  # the factors by which Pillow scales 2 and 4 bits to 8
NOT_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow needs other programs for these


class DataError(ValueError):
    """Data that cannot be used. The message names the files."""


@functools.cache
def formats() -> list[str]:
    """The formats that Pillow decodes without other programs."""
    Image.init()
    return [kind for kind in Image.ID if kind not in NOT_IMAGES]


@functools.cache
def suffixes() -> frozenset[str]:
    """The file suffixes of the formats."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats())


def is_image(name: str) -> bool:
    """Whether a file of this name is an image: Pillow opens its suffix, and it is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes()


def decode_image(path: Path) -> Image.Image:
    """An image in 8-bit RGB, oriented as EXIF says. Of 16-bit grey values the upper eight bits are kept."""
    image, _ = _decode(path, "image")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in EIGHT_BITS:
        raise DataError(f"{path}: expected an image of 8 or 16 bits, got one of mode {image.mode}")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: Path) -> tv_tensors.Image:
    """An image as (3, H, W) uint8."""
    return tv_tensors.Image(decode_image(path))


def read_ids(path: Path) -> np.ndarray:
    """The ids of a mask file as (H, W) uint8, oriented as EXIF says."""
    image, packing = _decode(path, "mask")
    if image.mode not in ("1", "L", "P"):
        raise DataError(f"{path}: expected 8-bit class ids, got an image of mode {image.mode}")
    ids = np.array(image, np.uint8)
    return ids // SPREAD[packing[:3]] if image.mode == "L" and packing[:3] in SPREAD else ids


def read_mask(path: Path, table: torch.Tensor) -> tv_tensors.Mask:
    """The classes of a mask file as (H, W) uint8, with IGNORE."""
    ids = read_ids(path)
    classes = table.numpy()[ids]
    unknown = ids[classes == UNKNOWN]
    if unknown.size:
        raise unknown_ids(path, unknown)
    return tv_tensors.Mask(torch.from_numpy(classes))


def unknown_ids(path: Path, ids: np.ndarray) -> DataError:
    """The error for ids that are neither classes nor ignored."""
    return DataError(f"{path}: ids {np.unique(ids).tolist()} are neither classes nor in data.ignore")


def _decode(path: Path, kind: str) -> tuple[Image.Image, str]:
    """The first image of a file, oriented as EXIF says, and the packing of its pixels in the file."""
    try:
        with Image.open(path, formats=formats()) as file:
            packing = file.tile[0][3] if file.tile else ""
            file.load()
            turned = _orientation(file) != 1
            image = ImageOps.exif_transpose(file) if turned else file
    except Exception as error:  # Pillow's readers raise many types of exceptions on broken files
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable {kind}: {said}") from error
    return image, str(packing[0] if isinstance(packing, tuple) else packing)


def _orientation(file: Image.Image) -> int:
    try:
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  # viewers ignore a broken EXIF block, too
        return 1
