"""The kernels of primitives.cu and faults.cu as a Python module."""

from __future__ import annotations

from types import ModuleType

from emulator import build

KERNELS = [build.EMULATOR / name for name in ("primitives.cu", "faults.cu")]


def load() -> ModuleType:
    return build.load("corrmatch_planted", build.EMULATOR / "planted.cpp", KERNELS)
