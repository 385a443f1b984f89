"""A FixMatch loop from scratch, with the two propagations of CorrMatch: few labelled images, many without labels.

    python examples/fixmatch.py [--steps 120] [--out fixmatch.png]

Pseudo-labels of a clean view teach a distorted view. `region_propagate` gives each region of the clean view one label,
which makes more pixels reliable; `pixel_propagate` spreads the logits, and what comes of it is taught as well. The same
network with the labelled images alone is the baseline. Needs `pip install '.[examples]'`.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from scenes import CLASSES, draw_scenes, mean_iou, rows
from torch import Tensor, nn

from corrmatch import ops

SIZE = 64
RELIABLE = 0.9  # confidence of a pseudo-label that counts, and share of a region that must agree


class Network(nn.Module):
    """A few convolutions; logits, and query and key for the correlation, at a quarter of the size."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = (3, width, width, 2 * width)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, s in zip(channels, channels[1:], (2, 2, 1), strict=False)
        ]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2), nn.ReLU())
        self.classify, self.query, self.key = (nn.Conv2d(2 * width, CLASSES, 1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, query and key."""
        f = self.encoder(x)
        return self.classify(f), self.query(f), self.key(f)


def loss(logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Cross-entropy at full size, over the pixels that count."""
    each = F.cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), labels, reduction="none")
    return each.mean() if counts is None else (each * counts).mean()


def distorted(x: Tensor) -> Tensor:
    """Another light, and noise."""
    light = 1 + 0.4 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    return x * light + 0.15 * torch.randn_like(x)


def train(images: Tensor, labels: Tensor, unlabelled: Tensor | None, steps: int) -> Network:
    """The network after so many steps; `unlabelled` None: with the labelled images alone."""
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        logits, query, key = model(distorted(images))
        total = loss(logits, labels) + loss(ops.pixel_propagate(query, key, logits.detach(), normalize=True), labels)
        if unlabelled is not None and step >= steps // 5:  # until then pseudo-labels are guesses
            chosen = unlabelled[torch.randperm(len(unlabelled))[:8]]
            with torch.no_grad():
                clean, query, key = model(chosen)
                size = (SIZE, SIZE)
                guess, confidence, _ = ops.pseudo_label(clean, size=size)
                seeds = torch.randint(query.shape[2] * query.shape[3], (32,))
                masks = ops.region_masks(query, key, seeds, size, connected="seed")
                guess, reliable = ops.region_propagate(
                    guess, confidence >= RELIABLE, masks, RELIABLE, num_classes=CLASSES
                )
            logits, query, key = model(distorted(chosen))
            spread = ops.pixel_propagate(query, key, logits.detach(), normalize=True)
            total = total + loss(logits, guess, reliable) + 0.5 * loss(spread, guess, reliable)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: Network, images: Tensor) -> Tensor:
    """Labels at full size."""
    return ops.pseudo_label(model(images)[0], size=images.shape[2:])[0]


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default="fixmatch.png")
    options = parser.parse_args(arguments)
    images, labels = draw_scenes(range(3), SIZE)
    unlabelled, _ = draw_scenes(range(100, 140), SIZE)
    held_out, truth = draw_scenes(range(200, 224), SIZE)
    alone = predict(train(images, labels, None, options.steps), held_out)
    found = predict(train(images, labels, unlabelled, options.steps), held_out)
    print(f"{len(images)} labelled images, {len(unlabelled)} without labels, {len(held_out)} held out")
    print(f"  labelled alone        mean IoU {mean_iou(alone, truth):5.1f} %")
    print(f"  with propagation      mean IoU {mean_iou(found, truth):5.1f} %")
    names = ("Held-out image", "Labelled alone", "With propagation", "Truth")
    rows(options.out, [dict(zip(names, x, strict=True)) for x in zip(held_out[:3], alone, found, truth, strict=False)])
    print(f"image: {options.out}")


if __name__ == "__main__":
    main()
