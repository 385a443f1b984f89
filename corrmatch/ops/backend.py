"""The choice of an implementation for a call. One predicate, `Backend.refusal`, both decides and explains.

Each op registers its implementations and their limits in the file that defines it (`implementation`). `choose`,
`corrmatch info` and the documentation read them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from corrmatch import _C
from corrmatch.ops import cuda

HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 128 * 1024  # bytes; GPUs of compute capability 8.6, 8.9 and 12 have 99 KiB
Run = TypeVar("Run", bound=Callable[..., Any])


@dataclass(frozen=True)
class Implementation:
    """One op on one backend, and its limits.

    Attributes:
        run: Computes the op. Its arguments are those of the registered op without the backend.
        dtypes: Supported floating dtypes; None for all. All integer dtypes are supported.
        channels: Largest supported number of channels; None for any number.
        narrow: The same for float32 and float16 on GPUs whose blocks have less than SMALL shared memory.
        capability: Least supported compute capability of a GPU, 80 for 8.0; None for all.
    """

    run: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] | None = None
    channels: int | None = None
    narrow: int | None = None
    capability: int | None = None

    def refusal(self, *tensors: Tensor) -> str | None:
        """The reason why it does not support these tensors, which are on one device; None if it does."""
        if self.capability is not None and tensors[0].device.type == "cuda" and not torch.compiler.is_compiling():
            reason = self._refusal_of_gpu(*tensors)
            if reason is not None:
                return reason
        for tensor in tensors:
            if self.dtypes is not None and tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                return f"it does not take {str(tensor.dtype).removeprefix('torch.')}"
            if self.channels is not None and tensor.shape[1] > self.channels:
                return f"it takes at most {self.channels} channels, not {tensor.shape[1]}"
        return None

    def _refusal_of_gpu(self, *tensors: Tensor) -> str | None:
        gpu = torch.cuda.get_device_properties(tensors[0].device)
        if self.capability is not None and 10 * gpu.major + gpu.minor < self.capability:
            least = f"{self.capability // 10}.{self.capability % 10}"
            return f"it takes GPUs of compute capability {least} or more, not {gpu.major}.{gpu.minor}"
        if self.narrow is None:
            return None
        most = max(tensor.shape[1] for tensor in tensors)
        shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's annotations lack it
        if most <= self.narrow or shared >= SMALL or all(tensor.dtype == torch.bfloat16 for tensor in tensors):
            return None
        return f"on {gpu.name} it takes at most {self.narrow} channels of float32 or float16, not {most}"


# By backend, best first, and by op. The file of each op adds its implementations.
_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {"cuda": {}, "triton": {}, "cpu": {}, "reference": {}}
NAMES = tuple(_IMPLEMENTATIONS)


def implementation(op: str, backend: str, **limits: Any) -> Callable[[Run], Run]:
    """Registers a function that computes `op` on `backend`. `limits` are attributes of `Implementation`."""

    def register(run: Run) -> Run:
        _IMPLEMENTATIONS[backend][op] = Implementation(run, **limits)
        return run

    return register


def call(op: str, backend: str, *arguments: Any) -> Any:
    """Calls the implementation of `op` on `backend`."""
    return _IMPLEMENTATIONS[backend][op].run(*arguments)


@functools.cache
def kernels(name: str) -> ModuleType:
    """A module of Triton kernels. The first call that needs it imports it, because the import of Triton is slow."""
    return importlib.import_module(f"corrmatch.kernels.{name}")


@dataclass(frozen=True)
class Backend:
    """A backend in this installation.

    Attributes:
        name: Its name as an argument `backend=`.
        devices: Supported device types; None for all.
        implementations: Its implementations by op, each with limits of its own.
        missing: The reason why it cannot run in this installation; None if it can.
        detail: A note for `corrmatch info` on what is in use.
        automatic: Whether `choose` may take it when no backend is named.
    """

    name: str
    devices: tuple[str, ...] | None
    implementations: Mapping[str, Implementation]
    missing: str | None = None
    detail: str = ""
    automatic: bool = True

    @property
    def available(self) -> bool:
        """Whether the backend can run in this installation."""
        return self.missing is None

    @property
    def ops(self) -> frozenset[str]:
        """Names of the ops that the backend implements."""
        return frozenset(self.implementations)

    def refusal(self, op: str, *tensors: Tensor) -> str | None:
        """The reason why it cannot compute `op` of these tensors, which are on one device; None if it can."""
        if self.missing is not None:
            return self.missing
        if op not in self.implementations:
            return f"it has no {op}"
        device = tensors[0].device.type
        if self.devices is not None and device not in self.devices:
            return f"it takes tensors on {' or '.join(self.devices)}, not on {device}"
        return self.implementations[op].refusal(*tensors)


def _known(*, gpu: bool) -> tuple[Backend, ...]:
    """All backends, best first, for an installation with or without a GPU."""
    cpu, reference = _IMPLEMENTATIONS["cpu"], _IMPLEMENTATIONS["reference"]
    return (
        _cuda(gpu),
        _triton(gpu),
        Backend("cpu", ("cpu",), cpu, detail=f"{_C.cpu.isa()} of {', '.join(_C.cpu.isas())}"),
        Backend("reference", None, reference, detail="plain PyTorch, materialises; for checks"),
    )


def _cuda(gpu: bool) -> Backend:
    missing = None
    if cuda.EXTENSION is None:
        missing = _C.cuda_status
    elif not cuda.EMULATED and not gpu:
        missing = f"no GPU ({_C.cuda_status})"
    return Backend(
        "cuda",
        ("cpu",) if cuda.EMULATED else ("cuda",),
        _IMPLEMENTATIONS["cuda"],
        missing,
        detail="emulated on the CPU; for checks" if cuda.EMULATED else _C.cuda_status,
        automatic=not cuda.EMULATED,
    )


def _triton(gpu: bool) -> Backend:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "triton is not installed"
    elif not interpreted and not gpu:
        missing = "no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
    return Backend(
        "triton",
        ("cpu",) if interpreted else ("cuda",),
        _IMPLEMENTATIONS["triton"],
        missing,
        detail="interpreted on the CPU; for checks" if interpreted else "",
        automatic=not interpreted,
    )


# These backends assume a GPU, because a CUDA tensor proves that there is one. Asking torch would start the driver, and
# forked processes could not use it then.
_BACKENDS = _known(gpu=True)


def use_emulator(extension: Any) -> None:
    """Replaces the backend "cuda" by this extension of tests/emulator, which takes CPU tensors."""
    global _BACKENDS
    cuda.EXTENSION, cuda.EMULATED = extension, True
    _BACKENDS = _known(gpu=True)


def backends() -> dict[str, Backend]:
    """The backends by name, best first. Each tells whether it is available and, if not, why."""
    return {backend.name: backend for backend in _known(gpu=torch.cuda.is_available())}


def choose(op: str, backend: str | None, *tensors: Tensor) -> str:
    """The name of the backend that computes `op` of these tensors.

    Raises ValueError with the reason if an explicit backend cannot. A backend named by `CORRMATCH_BACKEND` counts as
    explicit for each op that it implements.
    """
    if backend is None:
        backend = os.environ.get("CORRMATCH_BACKEND") or None
        if backend in NAMES and op not in _BACKENDS[NAMES.index(backend)].ops:
            backend = None
    if backend is None:
        for candidate in _BACKENDS:
            if candidate.automatic and candidate.refusal(op, *tensors) is None:
                return candidate.name
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    reason = _BACKENDS[NAMES.index(backend)].refusal(op, *tensors)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op}: {reason}")
    return backend


def run_on_cpu(kernel: Callable[..., None], *arguments: object) -> None:
    """Calls an operator of the extension with torch's number of threads as its last argument."""
    threads = torch.get_num_threads()
    if _forked is None or threads == 1:
        kernel(*arguments, threads)
    else:
        _forked.submit(kernel, *arguments, threads).result()


# OpenMP keeps a team of threads for each thread that calls it. A fork copies the calling thread without its team, and a
# call from this thread would wait for the team for ever. A new thread starts a team of its own.
_forked: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked
    _forked = ThreadPoolExecutor(1, "corrmatch")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
