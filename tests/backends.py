"""The backends under test: which exist here, on which device and with which instruction sets. The only such list.

To be imported before Triton, which reads when it is imported whether it interprets kernels on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from emulator import build

if not torch.cuda.is_available():  # the kernels run here as well
    os.environ["TRITON_INTERPRET"] = "1"

import corrmatch
from corrmatch import _C
from corrmatch.ops.backend import use_emulator

if not torch.cuda.is_available():
    use_emulator(build.Extension())

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """One way to run an op, on one device and with one instruction set: `name` is what `backend=` takes."""

    name: str
    device: str = "cpu"
    isa: str | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATING
    interpreted: bool = False  # a Triton kernel as a NumPy program, or a CUDA kernel emulated: a hundred times slower

    def fit(self, shape: tuple) -> tuple:
        """The shape, batch first, with no more images than take seconds."""
        return (min(shape[0], 8), *shape[1:]) if self.interpreted else shape

    def __str__(self) -> str:
        shared = self.device if self.name == "torch" else None  # the one implementation of several devices
        return "-".join(part for part in (self.name, shared, self.isa) if part is not None)

    @property
    def fast(self) -> bool:
        """Whether `pytest --fast` has it: the oracle, and what users get here when they name no backend."""
        return not self.interpreted and self.isa in (None, _C.cpu.isas()[-1])

    @property
    def exact(self) -> bool:
        """Whether results are the same to the last bit for any strides and any number of threads."""
        return self.name not in ("reference", "torch")


def targets(op: str) -> list[Target]:
    """Every way this installation can run the op."""
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
