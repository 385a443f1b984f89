"""The explanation of an extension that cannot be imported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def why_not(error: ImportError) -> str:
    """Explains the error of `from corrmatch import _C` and says what to do."""
    found = importlib.util.find_spec("corrmatch._C")
    if found is not None:
        return (
            f"corrmatch's compiled extension is there and cannot be loaded: {error} ({found.origin}). Install the "
            "library that is missing or too old; if the extension was built on another machine, build it on this one: "
            "`pip install --force-reinstall --no-deps --no-cache-dir .` in the source folder."
        )
    others = [path.name for path in sorted(Path(__file__).parent.glob("_C.*")) if path.suffix in (".so", ".pyd")]
    if others:
        return (
            f"corrmatch's compiled extension is there for another Python or platform: {', '.join(others)}. This is "
            f"{sys.implementation.cache_tag} on {sys.platform} ({sys.executable}): install corrmatch with it."
        )
    return (
        "corrmatch's compiled extension is missing. This is the source tree and nothing is built in it: run "
        "`pip install -c constraints.txt .` and start Python elsewhere than in the source folder, or "
        "`pip install -c constraints.txt -e .` to work on the source in place."
    )
