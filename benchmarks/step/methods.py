"""A training step of each method, for `bench_train --methods`, with the same network, crop and number of images."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from harness.case import CHANNELS, MASKS
from omegaconf import OmegaConf

from corrmatch.config import Config, parse
from corrmatch.data.datasets import find_data
from corrmatch.data.sample import draw_sample
from corrmatch.data.streams import Streams
from corrmatch.methods import METHODS, build_method
from corrmatch.methods.base import Progress, Run
from corrmatch.models.network import Network

EPOCH_STEPS, STEP = 100, 150  # an odd epoch, and a teacher that is no longer a copy
Passes = dict[str, int]


def config_of(name: str, options: argparse.Namespace, root: str) -> Config:
    """A run of the method on the synthetic sample."""
    sample = {"root": root, "images": "JPEGImages/{}.jpg", "masks": "SegmentationClass/{}.png"}
    lists = {split: f"splits/{split}.txt" for split in ("labeled", "unlabeled", "val")}
    model = {"backbone": options.backbone, "pretrained": False, "channels": options.channels}
    train = {"crop": options.crop, "batch_size": options.batch, "workers": 0}
    part = {"num_masks": MASKS}
    keys = {"method": name, "data": sample | lists, "model": model, "train": train, "propagation": part,
            "work_dir": f"{root}/runs/{name}"}  # fmt: skip
    return parse([OmegaConf.create(keys)])


def contenders(options: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], dict[str, Passes]]:
    """A step of each method, and its numbers of passes of a network with gradient and without."""
    steps, passes = {}, {}
    with tempfile.TemporaryDirectory() as root:
        draw_sample(Path(root))
        for name in options.methods or METHODS:
            steps[name], passes[name] = step_of(config_of(name, options, root), options.device)
    return steps, passes


def step_of(config: Config, device: str) -> tuple[Callable[[], Any], Passes]:
    """The whole step on a given batch, in the last phase: forward, backward, optimiser, `after_step`."""
    torch.manual_seed(0)
    data = find_data(config.data)
    method = build_method(config, CHANNELS).to(device).train()
    last = len(method.phases(1)) - 1
    for phase in range(last + 1):
        method.phase = phase
        method.begin(phase, Run(data, config, Path(config.work_dir), torch.device(device), 0, 1))
    trained = {id(p) for p in method.trains(last)}
    for p in method.parameters():
        p.requires_grad_(id(p) in trained)
    batch = send_to_device(Streams(data, method.streams(), config.train)[0], device)
    optimizer = torch.optim.SGD([p for _, p in method.trained()], 1e-6, momentum=0.9)

    def run() -> None:
        generator = torch.Generator(device).manual_seed(1)
        progress = Progress(STEP, 10 * EPOCH_STEPS, EPOCH_STEPS, last, generator)
        method(batch, progress).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.finish_step(progress)

    return run, passes_of(method, run)


def passes_of(method: torch.nn.Module, run: Callable[[], Any]) -> Passes:
    """Calls of backbones in one step: with gradient, and without."""
    counted = {"with gradient": 0, "without": 0}

    def count(*_: Any) -> None:
        counted["with gradient" if torch.is_grad_enabled() else "without"] += 1

    networks: Sequence[Network] = [m for m in method.modules() if isinstance(m, Network)]
    hooks = [network.backbone.register_forward_pre_hook(count) for network in networks]
    run()
    for hook in hooks:
        hook.remove()
    return counted
