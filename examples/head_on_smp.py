"""The correlation head on a model of segmentation_models_pytorch.

    python examples/head_on_smp.py [--steps 60] [--pretrained] [--out head_on_smp.png]

The head reads the decoder's features and spreads the logits along their similarities. Both outputs are trained; the
propagated one is what a method like CorrMatch would teach and be taught by. Needs `pip install '.[examples]'`.
"""

from __future__ import annotations

import argparse

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from scenes import CLASSES, draw_scenes, mean_iou, rows
from torch import Tensor, nn

from corrmatch.nn import CorrelationHead


class WithHead(nn.Module):
    """Any model of the library: encoder, decoder, segmentation head; and the correlation head on the decoder."""

    def __init__(self, model: nn.Module, channels: int):
        super().__init__()
        self.model = model
        self.correlation = CorrelationHead(channels, CLASSES, hidden_channels=64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and propagated logits, at full size."""
        feature = self.model.decoder(self.model.encoder(x))
        logits = self.model.segmentation_head(feature)
        small = F.adaptive_avg_pool2d(feature, (x.shape[2] // 4, x.shape[3] // 4))
        propagated = self.correlation(small, logits).propagated
        return logits, F.interpolate(propagated, size=x.shape[2:], mode="bilinear", align_corners=True)


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pretrained", action="store_true", help="an encoder trained on ImageNet, fetched by smp")
    parser.add_argument("--out", default="head_on_smp.png")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    weights = "imagenet" if options.pretrained else None
    unet = smp.Unet("resnet18", encoder_weights=weights, classes=CLASSES, decoder_channels=(128, 64, 32, 32, 16))
    model = WithHead(unet, 16)
    images, labels = draw_scenes(range(24))
    held_out, truth = draw_scenes(range(200, 208))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(options.steps):
        chosen = torch.randperm(len(images))[:4]
        logits, propagated = model(images[chosen])
        loss = F.cross_entropy(logits, labels[chosen]) + F.cross_entropy(propagated, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits, propagated = model(held_out)
    found, spread, both = (x.argmax(1) for x in (logits, propagated, logits.softmax(1) + propagated.softmax(1)))
    print(f"{options.steps} steps on {len(images)} images, {len(held_out)} held out")
    for name, x in {"logits": found, "propagated logits": spread, "both": both}.items():
        print(f"  {name:<22}mean IoU {mean_iou(x, truth):5.1f} %")
    names = ("Held-out image", "Logits", "Propagated logits", "Truth")
    rows(options.out, [dict(zip(names, x, strict=True)) for x in zip(held_out[:3], found, spread, truth, strict=False)])
    print(f"image: {options.out}")


if __name__ == "__main__":
    main()
