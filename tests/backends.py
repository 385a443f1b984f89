"""The backends under test: those of this machine, with their devices and instruction sets. This is the only list.

It has to be imported before Triton, whose import reads whether kernels are interpreted on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from emulator import build
from interpreter import patch_once

if not torch.cuda.is_available():  # then the kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

import corrmatch
from corrmatch import _C
from corrmatch.ops.backend import use_emulator

if not torch.cuda.is_available():
    use_emulator(build.Extension())
    if corrmatch.backends()["triton"].available:
        patch_once()

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A way to run an op: a backend, whose `name` is an argument `backend=`, a device and an instruction set."""

    name: str
    device: str = "cpu"
    isa: str | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATING
    interpreted: bool = False  # a Triton kernel as a NumPy program, or an emulated CUDA kernel: a hundred times slower

    def fit(self, shape: tuple) -> tuple:
        """Limits the batch of a shape (batch first), so that a test takes seconds."""
        return (min(shape[0], 8), *shape[1:]) if self.interpreted else shape

    def __str__(self) -> str:
        shared = self.device if self.name == "torch" else None  # one implementation for several devices
        return "-".join(part for part in (self.name, shared, self.isa) if part is not None)

    @property
    def fast(self) -> bool:
        """Whether `pytest --fast` uses it: the oracle, and the backend that users get by default."""
        return not self.interpreted and self.isa in (None, _C.cpu.isas()[-1])

    @property
    def exact(self) -> bool:
        """Whether results have the same bits for all strides and numbers of threads."""
        return self.name not in ("reference", "torch")


def targets(op: str) -> list[Target]:
    """All targets of an op in this installation."""
    if op == "correlation_rows":  # one implementation for all devices
        return [Target("torch", device) for device in ("cpu", *["cuda"] * torch.cuda.is_available())]
    found = []
    for backend in corrmatch.backends().values():
        if not backend.available or op not in backend.ops:
            continue
        if backend.name == "cpu":
            found += [Target("cpu", isa=isa) for isa in _C.cpu.isas()]
        elif backend.devices is None:
            found.append(Target(backend.name))
        else:
            device = backend.devices[0]
            found.append(Target(backend.name, device, dtypes=FLOATING[1:], interpreted=device == "cpu"))
    return found
