"""A driver that launches nothing. With it the work of the host for launches can be counted and timed without a GPU.

Triton compiles for an H100, and this driver loads and launches the binaries. Tensors are on the CPU.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED = 227 * 1024  # bytes of shared memory of a block


class Driver:
    """The functions of a driver that Triton's runtime calls."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *rest: (1, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": SHARED, "multiprocessor_count": 132},
            unload_module=lambda module: None,
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """A launcher that records the name of the kernel, its sixth argument."""
        return lambda x, y, z, stream, function, *rest: self.launches.append(function)

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The target, an H100."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """The device of tensors."""
        return torch.device("cpu")


def install() -> Driver:
    """Makes Triton and corrmatch treat CPU tensors as those of an H100, for the rest of the process."""
    from corrmatch.ops import backend

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    torch.cuda.current_device = driver.get_current_device
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: properties
    backend._BACKENDS = tuple(
        dataclasses.replace(b, devices=("cpu",), missing=None) if b.name == "triton" else b for b in backend._BACKENDS
    )
    return driver
