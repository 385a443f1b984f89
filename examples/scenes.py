"""Images for the examples: reading, drawn samples, and panels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

# Of the classes of drawn images.
COLORS = np.array([[150, 180, 215], [120, 135, 80], [200, 120, 90], [85, 110, 150], [225, 205, 130]])


def read_image(path: str) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def read_labels(path: str, like: Tensor) -> Tensor:
    """An 8-bit label map of the size of the image."""
    labels = torch.from_numpy(np.array(Image.open(path)))
    if labels.dtype != torch.uint8 or labels.shape != like.shape[1:]:
        expected = f"expected 8-bit class ids of shape {tuple(like.shape[1:])}"
        raise SystemExit(f"{path}: {expected}, got {labels.dtype} of shape {tuple(labels.shape)}")
    return labels.long()


def draw_sample(folder: Path) -> list[str]:
    """Writes a noisy image of textured shapes and its dense labels; returns their paths and that of the panel."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:240, :320]
    labels = np.where(y < 110 + 14 * np.sin(x / 40), 0, 1)
    for cx, cy, radius, kind in ((70, 70, 38, 2), (230, 150, 60, 3), (140, 190, 28, 2), (280, 50, 30, 4)):
        labels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = kind
    labels[(abs(x - 150) < 9) & (y > 20)] = 4
    shade = 18 * np.sin(x / (3 + labels) + y / 7) + 25 * (y / 240 - 0.5)
    image = COLORS[labels] + shade[..., None] + rng.normal(0, 14, (240, 320, 3))
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "image.png")
    Image.fromarray(labels.astype(np.uint8)).save(folder / "labels.png")
    return [str(folder / name) for name in ("image.png", "labels.png", "panel.png")]


def panel(path: str, image: Tensor, labels: Tensor, maps: dict[str, Tensor], ignore: int) -> None:
    """Writes image, sparse labels (as dots large enough to see) and the label maps side by side."""
    palette = torch.tensor(colormaps["tab20"].colors)[[*range(0, 20, 2), *range(1, 20, 2)]]
    share = float((labels != ignore).float().mean())
    radius = max(1, int(0.2 * share**-0.5))
    marks = torch.where(labels == ignore, -1, labels)[None, None].float()
    dots = F.max_pool2d(marks, 2 * radius + 1, 1, radius)[0, 0].long()
    maps = {f"Sparse labels: {100 * share:.2g} % of the pixels": torch.where(dots < 0, ignore, dots)} | maps
    figure = Figure(figsize=(12, 1.2 + 12 * labels.shape[0] / labels.shape[1]), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    axes[0].imshow(image.permute(1, 2, 0).numpy())
    gray = 0.3 * image.mean(0).unsqueeze(-1)
    for ax, x in zip(axes[1:], maps.values(), strict=False):
        ax.imshow(torch.where((x == ignore).unsqueeze(-1), gray, palette[x % len(palette)]).numpy())
    for ax, title in zip(axes, ["Image", *maps, ""], strict=False):
        ax.set_title(title, fontsize=13)
        ax.set_axis_off()
    ids = [c for c in torch.stack(list(maps.values())).unique().tolist() if c != ignore]
    patches = [Patch(color=palette[c % len(palette)].tolist(), label=f"{c}") for c in ids]
    figure.legend(
        handles=patches,
        title="class",
        loc="outside lower center",
        ncols=20,
        frameon=False,
        handlelength=1,
        columnspacing=1.2,
    )
    figure.savefig(path, dpi=110)


CLASSES = 5  # of drawn scenes: sky, ground, ball, box, pole


def draw_scene(seed: int, size: int = 96) -> tuple[Tensor, Tensor]:
    """A noisy image (3, size, size) of textured shapes in places of their own, and its dense labels."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:size, :size] / size
    labels = np.where(y < rng.uniform(0.3, 0.6) + 0.05 * np.sin(6 * x + rng.uniform(0, 6)), 0, 1)
    for kind in (4, 3, 2, 3, 2):
        cx, cy, r = *rng.uniform(0.15, 0.85, 2), rng.uniform(0.09, 0.17)
        ball, box, pole = np.hypot(x - cx, y - cy) < r, np.maximum(abs(x - cx), abs(y - cy)) < r, abs(x - cx) < r / 3
        labels[{2: ball, 3: box, 4: pole & (abs(y - cy) < 3 * r)}[kind]] = kind
    palette = COLORS + rng.normal(0, 14, COLORS.shape)  # another light in every image
    shade = 18 * np.sin(96 * x / (3 + labels) + 14 * y) + 25 * (y - 0.5)
    image = palette[labels] + shade[..., None] + rng.normal(0, 12, (size, size, 3))
    return torch.from_numpy(image.clip(0, 255) / 255).permute(2, 0, 1).float(), torch.from_numpy(labels)


def draw_scenes(seeds: range, size: int = 96) -> tuple[Tensor, Tensor]:
    """Images (B, 3, size, size) and labels (B, size, size)."""
    images, labels = zip(*(draw_scene(seed, size) for seed in seeds), strict=True)
    return torch.stack(images), torch.stack(labels)


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Per cent, over the classes of the truth."""
    hits = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in truth.unique()]
    return 100 * float(torch.stack(hits).mean())


def rows(path: str, table: list[dict[str, Tensor]], classes: int = CLASSES) -> None:
    """Writes rows of images (3, H, W), label maps (H, W) of integers and heat maps (H, W) of floats, with titles."""
    colors = torch.tensor(colormaps["tab20"].colors)[::2]
    figure = Figure(figsize=(3 * len(table[0]), 3.2 * len(table)), layout="constrained")
    for line, axes in zip(table, figure.subplots(len(table), len(table[0]), squeeze=False), strict=True):
        for (title, x), ax in zip(line.items(), axes, strict=True):
            if x.dim() == 3:
                ax.imshow(x.permute(1, 2, 0).numpy())
            elif x.is_floating_point():
                ax.imshow(x.numpy(), cmap="magma")
            else:
                ax.imshow(colors[torch.where((x >= 0) & (x < classes), x, 7)].numpy())  # grey: none
            ax.set_title(title, fontsize=11)
            ax.set_axis_off()
    figure.savefig(path, dpi=90)
