"""Runs the examples of these pages; as a script, draws the images of the tutorial (`python docs/pages.py`)."""

from __future__ import annotations

import doctest
import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent


def run(page: Path) -> dict[str, Any]:
    """Runs the Python blocks of a page in one namespace, which it returns; raises where an example is wrong."""
    names: dict[str, Any] = {"__name__": page.stem}
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    if not blocks:
        raise ValueError(f"{page}: no example")
    before = Path.cwd()
    os.chdir(page.parent)  # where the images are that the examples read
    try:
        for block in blocks:
            line = text[: block.start(1)].count("\n")
            if ">>>" in block[1]:
                test = doctest.DocTestParser().get_doctest(block[1], names, page.name, str(page), line)
                doctest.DebugRunner().run(test, clear_globs=False)
                names = test.globs
            else:
                exec(compile("\n" * line + block[1], page, "exec"), names)
    finally:
        os.chdir(before)
    return names


def draw(folder: Path) -> None:
    """Writes the images of the tutorial."""
    import torch
    from matplotlib import colormaps, colors
    from matplotlib.figure import Figure

    seen = run(DOCS / "tutorial.md")
    (height, width), step = seen["size"], seen["size"][0] // seen["grid"][0]
    image, gray = seen["image"].permute(1, 2, 0), 0.5 * seen["image"].mean(0).unsqueeze(-1)
    names, marked = ("peru", "firebrick", "white", "orange", "cornflowerblue"), ("coffee", "saucer", "table")
    palette = torch.tensor([colors.to_rgb(name) for name in names])

    def save(name: str, panels: dict[str, torch.Tensor], points: dict[str, list[tuple[int, int]]]) -> None:
        figure = Figure(figsize=(4.2 * len(panels), 3.1), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for title, x, at in zip(panels, panels.values(), axes, strict=True):
            at.imshow(x.numpy(), extent=(0, width, height, 0))
            at.set_title(title, fontsize=11)
            at.set_axis_off()
        for color, places in points.items():
            y, x = step * (torch.tensor(places).T + 0.5)
            axes[0].plot(x, y, "o", color=color, markeredgecolor="black", markersize=6)
        figure.savefig(folder / f"{name}.jpg", dpi=75, pil_kwargs={"quality": 82})

    dots = {"white": seen["marks"].tolist()}
    rows = [row / row.max() for row in seen["rows"][0]]
    heat = [torch.from_numpy(colormaps["magma"](row.sqrt().numpy())) for row in rows]
    save("rows", {"the photograph": image} | dict(zip(marked, heat, strict=True)), dots)
    tint = torch.tensor([0.2, 0.5, 0.1])
    regions = [gray + tint * mask.unsqueeze(-1) for mask in seen["masks"].to_bool()[0]]
    save("masks", dict(zip(marked, regions, strict=True)), {})
    clicks = dict(zip(names, seen["clicks"], strict=True))
    save("propagated", {"37 clicks": image, "a label for every pixel": palette[seen["labels"][0]]}, clicks)
    shade = [0.25 + 0.75 * seen[name][0].unsqueeze(-1) for name in ("reliable", "reliable_after")]
    before, after = palette[seen["labels"][0]] * shade[0], palette[seen["labels_after"][0]] * shade[1]
    save("regions", {"before: dark is not reliable": before, "after 128 regions": after}, {})


if __name__ == "__main__":
    draw(DOCS / "tutorial")
