"""Recorded outputs of published methods, and networks that return recorded outputs.

The recordings are those in the folder CORRMATCH_GOLDEN (and its folder `methods`), else in shared/golden/methods beside
the checkout, else the small ones of tests/data/methods. A test runs for each seed that is found.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from corrmatch.config import parse
from corrmatch.methods import METHODS
from corrmatch.methods.base import Progress
from corrmatch.methods.parts.propagation import resolve
from corrmatch.models.network import Prediction

TESTS = Path(__file__).parent


def folder() -> Path:
    if "CORRMATCH_GOLDEN" in os.environ:
        named = Path(os.environ["CORRMATCH_GOLDEN"])
        return named / "methods" if (named / "methods").is_dir() else named
    shared = TESTS.parents[1] / "shared" / "golden" / "methods"
    return shared if shared.is_dir() else TESTS / "data" / "methods"


def recorded(pattern):
    """Parametrises a test by `path`, over the recordings whose names match."""
    paths = sorted(folder().glob(f"{pattern}.npz"))
    return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in paths])


def load(path, prefix=""):
    """Entries by name, as tensors. Half-precision inputs are exact, so they are converted to float32."""
    with np.load(path) as file:
        arrays = {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}
    tensors = {name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items() if x.dtype.kind in "fiub"}
    return {name: x.float() if x.dtype == torch.float16 else x for name, x in tensors.items()}


def relative(x, expected):
    """The largest difference over the largest expected value."""
    return ((x - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


class Recorded(nn.Module):
    """A network that returns recorded outputs, call by call, and keeps its inputs.

    Attributes:
        answers: Logits, or predictions, in the order of the calls.
        given: The images of each call, and whether the network was in training mode.
    """

    def __init__(self, *answers):
        super().__init__()
        self.answers = [x if isinstance(x, Prediction) else Prediction(x) for x in answers]
        self.given = []

    def forward(self, images, *, perturb=False, correlate=False, **kept):
        self.given.append((images, self.training))
        return self.answers[len(self.given) - 1]


class Factory:
    """Makes the networks of a method, in their order."""

    def __init__(self, num_classes, *networks):
        self.num_classes, self.networks = num_classes, iter(networks)

    def __call__(self):
        return next(self.networks)


def method_of(name, num_classes, *networks, **options):
    """A method whose networks return recorded outputs. `options` are its keys."""
    config = parse([OmegaConf.create({"data": {"root": "x"}, "method": name, name: options})])
    kind = METHODS[name]
    config.propagation = resolve(config.propagation, kind.correlation, kind.pseudo_labels)
    return kind(Factory(num_classes, *networks), config)


def progress(step=0, **changes):
    return Progress(step, 100, 10, 0, torch.Generator().manual_seed(0))._replace(**changes)


def weak_to_strong(at, views):
    """The batch of a recorded step of FixMatch or UniMatch, with so many strong views."""
    batch = {"labeled": {"image": at["x_image"], "label": at["x_label"].long()}}
    for name, prefix in {"unlabeled": "u", "mix": "mix"}.items():
        if f"{prefix}_weak" in at:
            batch[name] = {
                "weak": at[f"{prefix}_weak"],
                "strong": torch.stack([at[f"{prefix}_strong{k + 1}"] for k in range(views)], 1),
                "box": torch.stack([at[f"{prefix}_box{k + 1}"] == 1 for k in range(views)], 1),
                "ignore": at[f"{prefix}_ignore"] == 255,
            }
    return batch
