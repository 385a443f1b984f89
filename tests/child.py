"""Python code in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# The working directory of a child decides what it can import: these helpers, but not the source tree, which has no
# extension unless the installation is editable.
FOLDER = Path(__file__).parent


def run_python(code: str, *arguments: str) -> str:
    """The output of the code."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_two_processes(test_file: str, call: str, folder: Path) -> None:
    """Runs a call of a function in a test file, in two processes of torchrun."""
    file, script = Path(test_file), folder / "two.py"
    script.write_text(f"from pathlib import Path\nfrom {file.stem} import *\n{call}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    given = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([*map(str, {file.parent, FOLDER}), *([given] if given else [])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
