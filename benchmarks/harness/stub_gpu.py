"""A GPU that launches nothing, so that what the host does for a launch can be counted and timed without one.

Triton compiles for an H100 and asks this driver to load and launch what it made; tensors lie on the CPU.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED = 227 * 1024  # bytes of shared memory that a block may have


class Driver:
    """What Triton's runtime asks of a driver."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *rest: (1, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": SHARED, "multiprocessor_count": 132},
            unload_module=lambda module: None,
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """A launcher that notes the name of the kernel, its sixth argument."""
        return lambda x, y, z, stream, function, *rest: self.launches.append(function)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")


def install() -> Driver:
    """Makes Triton and corrmatch take CPU tensors for those of an H100. For a process of its own."""
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
