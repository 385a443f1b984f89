"""Peak memory, measured as the largest resident set of a separate process."""

from __future__ import annotations

import pytest
from child import run_python

from corrmatch import _C

pytestmark = pytest.mark.slow

MIB = 2**20
PROBE = """
import gc, sys
import torch
from corrmatch import RegionMasks, _C, ops

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def peak(call, *arguments):
    call(*arguments[0])  # brings in code and the allocator's first pages
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    call(*arguments[1])
    return status("VmHWM") - before

def maps(height, width, batch=1, channels=21):
    return [torch.randn(batch, channels, height, width, requires_grad=True) for _ in range(3)]

def propagate(query, key, value, **options):
    ops.pixel_propagate(query, key, value, **options).sum().backward()

torch.set_num_threads(int(sys.argv[2]))
_C.cpu.select_isa(sys.argv[1])
"""


def measure(isa, threads, expression):
    """Bytes in addition to the inputs, with gradients and results."""
    return int(run_python(PROBE + f"print({expression})", isa, str(threads)))


@pytest.mark.parametrize("isa", _C.cpu.isas())
def test_pixel_propagation_of_the_largest_map(isa):
    """Cityscapes at crop 801, as in the documentation. The map would take 397 MiB."""
    n, depth, channels, threads = 101 * 101, 21, 21, 2
    backward = 4 * n * (2 * depth + 2 * channels + channels + 17 * depth) + threads * 192 * n
    results = 4 * n * (2 * depth + 2 * channels + channels + 2)  # gradients, Z and its own, the normalizer
    assert measure(isa, threads, "peak(propagate, maps(5, 5), maps(101, 101))") < backward + results + 4 * MIB


@pytest.mark.parametrize("options", ["{}", "{'threshold': 0.06, 'normalize': True}"])
def test_pixel_propagation_is_linear_in_positions(options):
    isa = _C.cpu.isas()[-1]
    call = f"(lambda *x: propagate(*x, **{options}))"
    once = measure(isa, 2, f"peak({call}, maps(5, 5), maps(55, 55))")
    twice = measure(isa, 2, f"peak({call}, maps(5, 5), maps(110, 55))")
    assert once > MIB
    assert twice < 2 * once + 4 * MIB


def test_region_masks_store_no_images():
    """128 masks of 321 x 321 take 1.65 MB packed, 52.8 MB as floats."""
    call = "lambda size, q, k, v: ops.region_masks(q, k, torch.arange(25).repeat(6)[:128], (size, size))"
    assert measure(_C.cpu.isas()[-1], 2, f"peak({call}, (33, *maps(5, 5)), (321, *maps(41, 41)))") < 16 * MIB


def test_region_propagation_unpacks_no_masks():
    """In addition to 128 masks of 321 x 321, 13 MB as bool, the op needs a few bit maps and its results."""
    call = "lambda n: ops.region_propagate(labels[:, :n, :n], flags[:, :n, :n], masks[n], 0.4, num_classes=21)"
    setup = (
        "labels, flags = torch.randint(21, (1, 321, 321)), torch.ones(1, 321, 321, dtype=torch.bool)",
        "packed = lambda n: torch.full((1, 128, RegionMasks.words((n, n))), 5, dtype=torch.int32)",
        "masks = {n: RegionMasks(packed(n), (n, n)) for n in (9, 321)}",
    )
    expression = f"(exec({';'.join(setup)!r}, globals()), peak({call}, (9,), (321,)))[1]"
    assert measure(_C.cpu.isas()[-1], 2, expression) < 6 * MIB


def test_pseudo_labels_store_no_enlarged_logits():
    """21 channels of 801 x 801 floats would take 51 MiB; labels and confidence take 7.3."""
    call = "lambda x, n: ops.pseudo_label(x, size=(n, n))"
    logits = "torch.randn(1, 21, 101, 101)"
    assert measure(_C.cpu.isas()[-1], 2, f"peak({call}, ({logits}, 9), ({logits}, 801))") < 12 * MIB
