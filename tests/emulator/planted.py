"""The kernels of primitives.cu and faults.cu, by name."""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
from emulator import build

KERNELS = [build.EMULATOR / name for name in ("primitives.cu", "faults.cu")]


@functools.cache
def module() -> ModuleType:
    return build.load("corrmatch_planted", build.EMULATOR / "planted.cpp", KERNELS)


def seed(number: int) -> None:
    build.seed(module(), number)


def attempt(name: str, given: np.ndarray, taken: np.ndarray, **numbers: int | tuple[int, ...]) -> str:
    """Launches a kernel, which reads `given` and writes `taken`. Returns the name of the error of the launch."""
    whole = {key: (*value, 1, 1)[:3] if isinstance(value, tuple) else value for key, value in numbers.items()}
    return module().launch(name, given, taken, **whole)


def launch(name: str, given: np.ndarray, taken: np.ndarray, **numbers: int | tuple[int, ...]) -> np.ndarray:
    """The copy of `taken` after the kernel."""
    taken = np.array(taken)
    assert attempt(name, given, taken, **numbers) == "cudaSuccess"
    return taken
