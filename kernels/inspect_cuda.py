"""Prints what the machine code of the CUDA kernels costs. It is read from the compiled extension, without a GPU.

    python -m corrmatch.kernels.inspect_cuda

The columns are threads a block, registers a thread, bytes of local memory a thread (spilled registers, and arrays that
registers cannot index), static shared memory, and occupancy: the share of a multiprocessor's threads that can run at
once with these registers and threads. Shared memory that a launch asks for can lower it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REGISTERS = 65536  # of a multiprocessor
THREADS = {86: 1536, 89: 1536, 120: 1536}  # of a multiprocessor; elsewhere 2048


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str
    arch: str
    threads: int
    registers: int
    local: int
    shared: int

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that can run at once, by registers and block size."""
        most = THREADS.get(int(re.sub(r"\D", "", self.arch)), 2048)
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, most // self.threads) * self.threads / most

    def __str__(self) -> str:
        return (
            f"{self.name:48} {self.arch:7} {self.threads:7} {self.registers:9} {self.local:6} {self.shared:7} "
            f"{100 * self.occupancy:8.0f} %"
        )


HEADER = f"{'kernel':48} {'arch':7} {'threads':>7} {'registers':>9} {'local':>6} {'shared':>7} {'occupancy':>10}"


def kernels(extension: Path) -> list[Kernel]:
    """The kernels in the extension, in its order."""
    code, usage = (run(tool("cuobjdump"), option, str(extension)) for option in ("-ptx", "-res-usage"))
    entries = re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", code, re.DOTALL)
    threads = {name: int(count) for name, count in entries}
    found, arch = [], ""
    pattern = r"arch = (sm_\w+)|Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for match in re.finditer(pattern, usage):
        if match[1] is not None:
            arch = match[1].removeprefix("sm_")
            continue
        name, registers, stack, shared, local = match.groups()[1:]
        count = threads[name]
        found.append(Kernel(readable(name), arch, count, int(registers), int(stack) + int(local), int(shared)))
    return found


def readable(mangled: str) -> str:
    """A kernel's name and template arguments: vote_kernel<true>."""
    if shutil.which("c++filt") is None:
        return mangled
    name = run("c++filt", mangled).strip().replace("(anonymous namespace)::", "").replace("corrmatch::", "")
    return re.sub(r"^void ", "", name).split("(")[0].removeprefix("cuda::").replace("cuda::", "")


def tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit. Triton contains these tools, too."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    found = next((str(folder / name) for folder in folders if (folder / name).exists()), shutil.which(name))
    if found is not None:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def run(*command: str) -> str:
    """The output of a command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the exit code is 1 if a kernel uses local memory or there is none."""
    from corrmatch import _C

    argparse.ArgumentParser(
        prog="python -m corrmatch.kernels.inspect_cuda", description=__doc__.splitlines()[0]
    ).parse_args(arguments)
    found = kernels(Path(_C.__file__))
    print(f"CUDA kernels: {_C.cuda_status}")
    print(HEADER)
    for kernel in found:
        print(kernel)
    return int(not found or any(kernel.local > 0 for kernel in found))


if __name__ == "__main__":
    sys.exit(main())
