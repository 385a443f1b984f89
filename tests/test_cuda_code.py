"""The machine code of the CUDA kernels in the installed extension, which has them if they could be built."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from child import FOLDER

from corrmatch import _C
from corrmatch.kernels import inspect_cuda

ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None and not hasattr(_C, "cuda"), reason="built without nvcc")
@pytest.mark.skipif(_C.cuda_status == "built for native", reason="built for the GPU of this machine alone")
def test_every_kernel_on_every_architecture_keeps_to_its_registers():
    command = [sys.executable, "-m", "corrmatch.kernels.inspect_cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.rsplit(maxsplit=7) for line in done.stdout.splitlines()[2:]]
    names = {row[0] for row in rows}
    assert {"mask_kernel", "vote_kernel", "filter_kernel", "unite_kernel"} <= {name.split("<")[0] for name in names}
    assert {row[1] for row in rows} == set(ARCHITECTURES)
    assert len(rows) == len(names) * len(ARCHITECTURES)
    for name, _, _, registers, local, _, occupancy, _ in rows:
        assert int(local) == 0, f"{name} spills"
        assert 16 <= int(registers) <= 128
        assert int(occupancy) >= 25


def test_occupancy_of_known_kernels():
    def occupancy(arch, threads, registers):
        return inspect_cuda.Kernel("", arch, threads, registers, 0, 0).occupancy

    assert occupancy("90a", 256, 32) == 1.0
    assert occupancy("90a", 1024, 64) == 0.5
    assert occupancy("86", 1024, 64) == pytest.approx(2 / 3)
    assert occupancy("80", 256, 80) == 0.375
