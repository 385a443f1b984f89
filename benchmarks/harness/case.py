"""Parts of a benchmark of an op: cases, inputs, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.measure import Contender

CHANNELS = 21  # of query, key and value, and the number of classes: Pascal VOC
MASKS = 128  # sampled regions of an image
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
ONE_SIZE = ((41, 41),)


@dataclass
class Case:
    """One op at one size.

    Attributes:
        op: Name of the op.
        size: The size, as text.
        elements: Number of elements of a call.
        unit: Name of the elements.
        workload: A description of the inputs.
        contenders: Contenders, corrmatch first.
        expected: The result of the oracle, in the form of `Contender.both`.
        error: Function that returns the distance of a result from that of the oracle.
        tolerance: Largest error that passes.
        positions: N, for the plot.
        batch: B.
        oracle_bytes: Approximate memory of the oracle.
        exponentials: Least number of exponentials of the forward and of both passes, if it bounds their time.
        share: Share of the time for this op and setting.
    """

    op: str
    size: str
    elements: int
    unit: str
    workload: str
    contenders: list[Contender]
    expected: Callable[[], tuple[Any, ...]]
    error: Callable[[tuple[Any, ...], tuple[Any, ...]], float]
    tolerance: float
    positions: int
    batch: int
    oracle_bytes: int = 0
    exponentials: dict[str, int] = field(default_factory=dict)
    share: float = 1.0


@dataclass(frozen=True)
class Setting:
    """The choices of the command line for a case."""

    grid: tuple[int, int]
    batch: int
    dtype: torch.dtype
    device: str
    value_grad: bool
    compiled: bool
    channels: int = CHANNELS
    patch: int | None = None

    @property
    def full(self) -> tuple[int, int]:
        """Size of the image: 8 pixels a grid step with aligned corners (41 to 321), or patches (37 to 518)."""
        if self.patch is not None:
            return self.patch * self.grid[0], self.patch * self.grid[1]
        return 8 * (self.grid[0] - 1) + 1, 8 * (self.grid[1] - 1) + 1

    def generator(self) -> torch.Generator:
        """The generator of the inputs. It runs on the CPU, so all devices get the same inputs."""
        return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Benchmark:
    """The benchmark of one op.

    Attributes:
        op: Name of the op.
        title: A description of the op.
        cases: Function that yields its cases at one setting. The inputs of a case are made when it is requested.
        sizes: Default sizes of the grid.
        share: Share of the time for all ops, at one size.
        backward: Whether its backward is measured, too.
        notes: Function that returns notes below the tables, from the device and the use of torch.compile.
    """

    op: str
    title: str
    cases: Callable[[Setting], Iterator[Case]]
    sizes: tuple[tuple[int, int], ...] = ONE_SIZE
    share: float = 1.0
    backward: bool = False
    notes: Callable[[str, bool], list[str]] = lambda device, compiled: []


def smooth(batch: int, channels: int, size: tuple[int, int], waves: int, generator: torch.Generator) -> Tensor:
    """Smooth random maps with about so many bumps along each side."""
    coarse = torch.randn(batch, channels, waves, waves, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)


def smooth_features(s: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key that vary smoothly over the image, as those of a network do, and the sampled positions."""
    generator = s.generator()
    features = smooth(s.batch, s.channels, s.grid, 4, generator)
    query, key = (
        (features + 0.1 * torch.randn(features.shape, generator=generator)).to(s.device, s.dtype) for _ in range(2)
    )
    positions = s.grid[0] * s.grid[1]
    return query, key, torch.randperm(positions, generator=generator)[:MASKS].to(s.device)


def largest_relative_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative error in the Frobenius norm of results and gradients."""
    pairs = zip(got, want, strict=False)  # a contender without a backward has no gradients
    return largest(float(torch.linalg.vector_norm(x.double() - y) / torch.linalg.vector_norm(y)) for x, y in pairs)


def largest(errors: Iterable[float]) -> float:
    """The largest error, or NaN if there is one, which max() might ignore."""
    return float(np.max(list(errors)))


def share_different(x: Tensor, y: Tensor) -> float:
    """The share of elements that differ."""
    return float((x != y).double().mean())


def percent(x: Tensor) -> str:
    """The share of elements that are set, as text."""
    return f"{100 * float(x.double().mean()):.0f} %"
