"""Python code in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

# Where a child starts decides what it can import: these helpers, but not the source tree, which lacks the extension
# unless the installation is editable.
FOLDER = Path(__file__).parent


def run_python(code: str, *arguments: str) -> str:
    """What the code prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    return done.stdout
