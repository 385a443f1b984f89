"""The machine code of the Triton kernels, compiled ahead of time without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from child import FOLDER

pytestmark = pytest.mark.slow

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
LINE = re.compile(
    r"^(?P<kernel>.+?) +sm_(?P<arch>\d+) +(?P<dtype>\w+) +\S+ \d warps +(?P<registers>\d+) +(?P<spilled>\d+) +[\d.]+"
    r"(?: +(?P<matrix>\S+) +(?P<slots>[\d.]+) +(?P<exponentials>[\d.]+) +(?P<divisions>[\d.]+))?$"
)
PASSES = {"row", "row, mean key", "column", "backward row", "backward column"}
LINEAR = {"pack", "fold", "gate", "label", "cross-entropy", "divergence"}  # in the positions: without an inner loop


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
        assert 32 <= int(match["registers"]) <= 255
        assert match["matrix"] == MATRIX[arch]
        assert float(match["divisions"]) == 0
        assert float(match["slots"]) > 1
        if arch == 90 and match["dtype"] == "bfloat16":
            assert float(match["slots"]) <= 8, "more than an H100 issues in the time of one exponential"
        # The online softmax of the row pass has one exponential a row and tile besides.
        assert 1 <= float(match["exponentials"]) <= (1.2 if match["kernel"].startswith("row") else 1)
