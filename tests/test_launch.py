"""Work of the host for a call: number of launches and binaries, and the equality of direct launches."""

from __future__ import annotations

import json
import os
from pathlib import Path

import bench_host
import pytest
import torch
from child import run_python

from corrmatch import ops

pytestmark = pytest.mark.slow  # the interpreter

BENCHMARKS = Path(bench_host.__file__).parent
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")


@pytest.fixture
def launches(monkeypatch):
    """A list to which the names of interpreted kernels are added."""
    from triton.runtime.interpreter import GridExecutor

    found, call = [], GridExecutor.__call__

    def noted(self, *arguments, **options):
        found.append(self.fn.__name__)
        return call(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    return found


def maps(size=(5, 7), dtype=torch.float32, batch=1):
    return [torch.randn(batch, c, *size).to(dtype) for c in (21, 21, 19)]


FORWARD = ["pack_kernel", "row_kernel", "column_kernel"]
BACKWARD = ["pack_gradient_kernel", "backward_row_kernel", "backward_column_kernel"]


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
def test_three_launches_each_way(launches, dtype, normalize):
    leaves = [x.requires_grad_() for x in maps(dtype=dtype)]
    z = ops.pixel_propagate(*leaves, normalize=normalize, backend="triton")
    assert launches == FORWARD
    launches.clear()
    z.sum().backward()
    assert launches == BACKWARD
    launches.clear()
    with torch.no_grad():
        ops.pixel_propagate(*leaves, normalize=normalize, backend="triton")
    assert launches == FORWARD


@INTERPRETED
def test_a_gate_costs_one_launch_and_its_confidence_another(launches):
    leaves = [x.requires_grad_() for x in maps()]
    z = ops.pixel_propagate(*leaves, threshold=0.3, backend="triton")
    assert launches == ["confidence_gate_kernel", "open_rows_kernel", *FORWARD]
    launches.clear()
    z.sum().backward()
    assert launches == BACKWARD
    launches.clear()
    ops.pixel_propagate(*maps(), threshold=0.3, confidence=torch.rand(1, 5, 7), backend="triton")
    assert launches == ["open_rows_kernel", *FORWARD]


STUBBED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, triton
from harness import stub_gpu
from corrmatch import ops
driver = stub_gpu.install()
"""

BINARIES = """
asked = set()

def note(*, key, fn, **rest):  # compiles nothing
    asked.add((fn.name.split(".")[-1], str(key)))
    return True

triton.knobs.runtime.jit_cache_hook = note
sizes = [(5 + i % 11, 3 + i % 17) for i in range(50)]
for i, size in enumerate(sizes):
    # A part of a larger image, in either memory format, so that strides, addresses and batches are of all kinds.
    x = torch.randn(1 + i % 3, 21, size[0] + 1, size[1] + 2)[..., 1:, i % 3 : i % 3 + size[1]]
    x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
    leaves = [x.detach().clone().requires_grad_() if i % 5 else x.detach().requires_grad_() for _ in range(3)]
    z = ops.pixel_propagate(*leaves, backend="triton")
    torch.autograd.grad(z, leaves, torch.randn_like(z))
    ops.pixel_propagate(x, x, x, threshold=0.5, backend="triton")
    ops.pseudo_label(x, size=(8 * size[0] + 1, 8 * size[1] + i % 4), backend="triton")
    labels = torch.zeros(x.shape[0], 2 * size[0], 3 * size[1], dtype=torch.int64)
    ops.cross_entropy(leaves[0], labels, torch.ones(labels.shape), backend="triton")
names = [name for name, _ in asked]
print(json.dumps({name: names.count(name) for name in names}))
"""


def test_images_of_fifty_sizes_compile_once():
    """Sizes, strides and addresses need no new binary; other forms of a call do."""
    counts = json.loads(stubbed(BINARIES))
    expected = dict.fromkeys((*FORWARD, *BACKWARD, "confidence_gate_kernel", "open_rows_kernel", "label_kernel"), 1)
    expected |= {"loss_kernel": 1, "pack_kernel": 2, "row_kernel": 2, "column_kernel": 2}  # without and with a gate
    expected["row_kernel"] = 2  # with the mean key without a gate, without it with one
    assert counts == expected


STRAIGHT = """
from corrmatch.kernels import packing, pixel_propagate
kernels = packing.pack_kernel, pixel_propagate.row_kernel, pixel_propagate.column_kernel
query, key, value = (torch.randn(2, 5, 4, 4).bfloat16() for _ in range(3))
call = lambda x: ops.pixel_propagate(x, key, value, backend="triton")
call(query)
through_triton, driver.launches[:] = list(driver.launches), []
count = [len(kernel.compiled) for kernel in kernels]
for kernel in kernels:
    kernel.run = None  # what would be called for a launch that is not straight
call(query)
call(query.flip(3))
straight = list(driver.launches)
print(json.dumps([through_triton, straight, count == [len(kernel.compiled) for kernel in kernels]]))
"""


def test_what_is_compiled_is_launched_straight():
    through_triton, straight, same = json.loads(stubbed(STRAIGHT))
    assert through_triton == FORWARD
    assert straight == 2 * FORWARD
    assert same


def stubbed(code):
    """The output of the code on a stubbed GPU, which launches nothing."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return run_python(STUBBED + code, str(BENCHMARKS)).splitlines()[-1]
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def test_host_time_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench_host, "ROUNDS", 1)
    monkeypatch.setattr(bench_host, "CHILD", bench_host.CHILD.replace("calls=300", "calls=3"))
    assert bench_host.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert "(3)" in next(line for line in lines if line.startswith("forward, bfloat16"))
