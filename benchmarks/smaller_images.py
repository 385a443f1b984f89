"""Writes a smaller copy of a data set: images by averaging pixels, masks by the nearest pixel.

    python benchmarks/smaller_images.py CAMVID CAMVID_240 240 180

Files in a folder whose name contains `annot`, `mask` or `gtFine` are masks. Text files are copied, with the names of
the new files. The data of `configs/camvid_cpu.yaml` is made in this way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

IMAGES = (".jpg", ".jpeg", ".png")


def is_mask(path: Path) -> bool:
    """Whether a file is a mask, by the names of its folders in the data set."""
    return any(word in str(path.parent) for word in ("annot", "mask", "gtFine"))


def shrink(source: Path, target: Path, size: tuple[int, int]) -> None:
    """Copies a folder. Images become PNG files of width x height."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in tqdm(files):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            text = path.read_text()
            for suffix in IMAGES:
                text = text.replace(suffix, ".png")
            place.write_text(text)
        elif path.suffix in IMAGES:
            with Image.open(path) as image:
                resampling = Image.Resampling.NEAREST if is_mask(path.relative_to(source)) else Image.Resampling.BOX
                image.resize(size, resampling).save(place.with_suffix(".png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("width", type=int)
    parser.add_argument("height", type=int)
    arguments = parser.parse_args()
    shrink(arguments.source, arguments.target, (arguments.width, arguments.height))
