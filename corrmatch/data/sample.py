"""A small generated data set in the format of Pascal VOC, to try everything without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = {  # name and colour; each class has its own shape and texture
    "background": (96, 110, 88),
    "ball": (196, 78, 62),
    "crate": (172, 132, 72),
    "tent": (74, 110, 168),
    "fence": (214, 206, 180),
    "pond": (70, 148, 150),
}
SIZE = (160, 120)  # width, height
IMAGES = {"labeled": 12, "unlabeled": 84, "val": 24}
TONE = 26  # standard deviation of the colour between objects of a class
NOISE = 9


def draw_sample(folder: Path, seed: int = 0) -> None:
    """Writes JPEGImages, SegmentationClass, splits and classes.txt into the folder.

    The images that are listed as unlabelled have no mask.
    """
    for name in ("JPEGImages", "SegmentationClass", "splits"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    rng = np.random.default_rng(seed)
    for split, count in IMAGES.items():
        names = [f"{split}_{i:03}" for i in range(count)]
        (folder / "splits" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            image, labels = draw(rng)
            image.save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
            if split != "unlabeled":
                labels.save(folder / "SegmentationClass" / f"{name}.png")


def draw(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An image of three to six objects, later ones in front, and its labels with ignored outlines (255)."""
    labels = Image.new("L", SIZE, 0)
    color = np.empty((SIZE[1], SIZE[0], 3))
    color[:] = tone(rng, 0)
    color += texture(rng, 0)[..., None]
    for _ in range(rng.integers(3, 7)):
        kind = int(rng.integers(1, len(CLASSES)))
        shape = Image.new("L", SIZE, 0)
        outline(ImageDraw.Draw(shape), rng, kind)
        inside = np.array(shape) > 0
        labels.paste(kind, mask=shape)
        color[inside] = (tone(rng, kind) + texture(rng, kind)[..., None])[inside]
    light = np.linspace(rng.uniform(0.75, 1.2), rng.uniform(0.75, 1.2), SIZE[0])[None, :, None]
    noisy = color * light + rng.normal(0, NOISE, color.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    ids = np.array(labels)
    edge = np.array(labels.filter(ImageFilter.MaxFilter(3))) != np.array(labels.filter(ImageFilter.MinFilter(3)))
    return image, Image.fromarray(np.where(edge, 255, ids).astype(np.uint8))


def tone(rng: np.random.Generator, kind: int) -> np.ndarray:
    """The colour of one object."""
    return np.array(list(CLASSES.values())[kind]) + rng.normal(0, TONE, 3)


def texture(rng: np.random.Generator, kind: int) -> np.ndarray:
    """The texture of a class as brightness: mottled, plain, planks, cloth, lattice, ripples."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]] + rng.uniform(0, 20, (2, 1, 1))
    if kind == 0:
        return 12 * np.sin(x / 5 + 3 * np.sin(y / 9)) * np.sin(y / 6)
    if kind == 1:
        return -0.2 * np.hypot(x - SIZE[0] / 2, y - SIZE[1] / 2)
    if kind == 2:
        return 24 * np.sign(np.sin(y / 2))
    if kind == 3:
        return 18 * np.sin((x + y) / 2.5)
    if kind == 4:
        return 34 * np.sign(np.sin(x / 1.8))
    return 14 * np.sin(y / 1.6 + np.sin(x / 6))


def outline(pen: ImageDraw.ImageDraw, rng: np.random.Generator, kind: int) -> None:
    """Fills the shape of one object: disc, square, triangle, wide bar, ellipse."""
    x, y, r = rng.uniform(15, SIZE[0] - 15), rng.uniform(15, SIZE[1] - 15), rng.uniform(13, 30)
    if kind == 1:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif kind == 2:
        turn = rng.uniform(0, np.pi / 2) + np.arange(4) * np.pi / 2
        pen.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for a in turn], fill=255)
    elif kind == 3:
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=255)
    elif kind == 4:
        pen.rectangle((x - 2.2 * r, y - 0.45 * r, x + 2.2 * r, y + 0.45 * r), fill=255)
    else:
        pen.ellipse((x - 1.7 * r, y - 0.8 * r, x + 1.7 * r, y + 0.8 * r), fill=255)
