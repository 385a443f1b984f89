"""Writes a smaller copy of a data set: images by the mean of the pixels that fall together, masks by the nearest one.

    python benchmarks/smaller_images.py CAMVID CAMVID_240 240 180

Files in a folder whose name contains `annot`, `mask` or `gtFine` are masks. Text files are copied, and name what was
written. What `configs/camvid_cpu.yaml` trains on is made so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

IMAGES = (".jpg", ".jpeg", ".png")


def is_mask(path: Path) -> bool:
    """Whether the pixels are class ids, by the folders within the data set."""
    return any(word in str(path.parent) for word in ("annot", "mask", "gtFine"))


def shrink(source: Path, target: Path, size: tuple[int, int]) -> None:
    """Copies a folder; images become PNG of width x height."""
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
