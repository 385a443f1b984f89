"""The machine code of the Triton kernels, compiled ahead of time without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import triton
from child import FOLDER, run_python
from support import OPS

from corrmatch.kernels.configs import HOPPER_HALF

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

pytestmark = pytest.mark.slow

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
LINE = re.compile(
    r"^(?P<kernel>.+?) +sm_(?P<arch>\d+) +(?P<dtype>\w+) +\S+ \d warps +(?P<registers>\d+) +(?P<spilled>\d+) +[\d.]+"
    r"(?: +(?P<matrix>\S+) +(?P<slots>[\d.]+) +(?P<exponentials>[\d.]+) +(?P<divisions>[\d.]+)"
    r" +(?P<copies>\d+) +(?P<loads>\d+) +(?P<fences>\d+) +(?P<blocks>\d+))?$"
)
UNSPLIT = {"row", "row, mean key", "column", "backward row", "backward column"}
PASSES = UNSPLIT | {f"{name}, split" for name in UNSPLIT}
# Kernels that are linear in the positions have no inner loop.
LINEAR = {name for support in OPS.values() for name in getattr(support, "LINEAR", ())}
# Blocks that fit on a multiprocessor of an H100.
BLOCKS = {"row": 4, "row, mean key": 3, "column": 5, "backward row": 3, "backward column": 4}  # bfloat16
TILES = {name: name.removesuffix(", mean key").replace(" ", "_") for name in UNSPLIT}  # names in `configs.Tiles`
SINGLE = {"row": 8, "row, mean key": 15, "column": 12, "backward row": 25, "backward column": 20}  # slots, float32


@pytest.mark.parametrize("arch", MATRIX)
def test_published_channels(arch, tmp_path):
    """At D = C = 21 nothing spills, products are matrix instructions, and an element costs one exponential."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "corrmatch.kernels.inspect", "--arch", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [LINE.match(line) for line in done.stdout.splitlines()[2:]]
    assert None not in found, done.stdout
    for dtype in ("bfloat16", "float16", "float32"):
        assert {match["kernel"] for match in found if match["dtype"] == dtype} == PASSES | LINEAR
    for match in found:
        assert int(match["arch"]) == arch
        assert int(match["spilled"]) == 0
        assert (match["matrix"] is None) == (match["kernel"] in LINEAR)
        if match["matrix"] is None:
            continue
        # Split passes wait for loads rather than for instructions: they run where most of the device would be idle.
        unsplit = match["kernel"].removesuffix(", split")
        assert 32 <= int(match["registers"]) <= 255
        assert match["matrix"] == MATRIX[arch]
        assert float(match["divisions"]) == 0
        assert float(match["slots"]) > 1
        if arch == 90 and match["dtype"] == "bfloat16":
            limit = 8 if match["kernel"] in UNSPLIT else 8.1
            assert float(match["slots"]) <= limit, "more than an H100 issues in the time of one exponential"
            assert int(match["blocks"]) >= BLOCKS[unsplit] >= getattr(HOPPER_HALF, TILES[unsplit]).blocks
        if arch == 90:
            assert int(match["blocks"]) >= 2, "what `plan.splits_for` counts on"
        if arch == 90:
            assert int(match["copies"]) > 0, "loads that the loop waits for"
            assert int(match["loads"]) == 0
            # triton 3.8 has a fence between copies and products, 3.6 none. More fences would wait for stores.
            assert int(match["fences"]) <= (0 if TRITON < (3, 7) else 1)
            if match["dtype"] == "float32":
                assert float(match["slots"]) <= SINGLE[unsplit] + (0 if match["kernel"] in UNSPLIT else 0.3)
        # The online softmax of the row pass also has one exponential for each row and tile.
        assert 1 <= float(match["exponentials"]) <= (1.2 if match["kernel"].startswith("row") else 1)


SHARED = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory of a block
WIDEST = """
import sys
from corrmatch.kernels import inspect, pixel_propagate, pixel_propagate_backward
from corrmatch.kernels.configs import tiles_for
from corrmatch.kernels.plan import padded_channels

inspect.assembled = lambda ptx, arch: (0, 0, "")  # nothing is read from the machine code
arch, dtype, pieces, depth, channels = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
depth, channels = padded_channels(depth), padded_channels(channels)
tiles = tiles_for(arch, pieces > 1, max(depth, channels))
flags = {"GATED": True, "FOLDED": False, "KEPT": pieces, "PIECES": pieces, "DEPTH": depth, "CHANNELS": channels}
flags |= {"EXACT": pieces > 1, "DQUERY": True, "DVALUE": True, "SPLIT": True}
for name in ("column", "backward_row", "backward_column"):
    module = pixel_propagate if name == "column" else pixel_propagate_backward
    tile = getattr(tiles, name)
    made = inspect.compile_one(name, getattr(module, f"{name}_kernel"), arch, dtype, flags, tile)
    print(made.shared)
"""


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("dtype", "pieces"), [("bfloat16", 1), ("float32", 3)])
def test_the_most_channels_fit_the_shared_memory(arch, dtype, pieces, tmp_path, monkeypatch):
    """The numbers of channels that `Backend.refusal` allows, and one more for the mass."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    most = 128 if SHARED[arch] < 128 and pieces > 1 else 256
    found = run_python(WIDEST, str(arch), dtype, str(pieces), str(most), str(most + 1)).split()
    assert len(found) == 3
    assert max(map(int, found)) <= SHARED[arch] * 1024


SPLIT_CODE = """
import sys

import torch
from corrmatch.kernels import inspect
from corrmatch.kernels.plan import Plan

def show(ptx, arch):
    print(ptx)
    return 0, 0, ""

inspect.assembled = show  # the PTX is enough
dtype = sys.argv[1]
for variant in inspect.variants(Plan.on(90, getattr(torch, dtype), 21), 21):
    if variant.name.endswith(", split"):
        print("KERNEL", variant.name, sep="\\n")
        inspect.compile_one(variant.name, variant.kernel, 90, dtype, variant.constants, variant.tile)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_last_block_of_a_split_loop_sees_all_parts(dtype, tmp_path, monkeypatch):
    """The interpreter runs one block after another, so it cannot show that a block reads what others have written."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = run_python(SPLIT_CODE, dtype).split("KERNEL\n")[1:]
    assert {text.split("\n", 1)[0] for text in kernels} == {f"{name}, split" for name in UNSPLIT}
    for text in kernels:
        before, count, after = re.split(r"(\batom\.\S+)", text)
        assert count == "atom.global.gpu.acq_rel.add.u32"
        assert "bar.sync" in before.rpartition("st.global")[2], "all threads have to store before one of them counts"
        assert "bar.sync" in after.partition("ld.global")[0], "all threads have to wait for the count"
        first = re.search(r"\bld\.global\S*", after)
        assert first is not None
        assert first[0].startswith("ld.global.cg."), "the first-level cache may hold old values of the parts"
