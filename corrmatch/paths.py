"""Files and folders that users name."""

from __future__ import annotations

import codecs
import os
import tempfile
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Expands `~` and `~name` at the beginning to home folders."""
    return Path(os.path.expanduser(path))


def read_text(path: Path) -> str:
    """Reads text in UTF-8, or in UTF-16 with a byte order mark. Raises ValueError with the file's name otherwise."""
    try:
        content = path.read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error.reason} at byte {error.start}") from error
    if "\0" in text:  # UTF-16 without a mark, or not text
        raise ValueError(f"{path}: expected text in UTF-8, found a byte of 0")
    return text


def make_folder(path: Path) -> None:
    """Makes a folder if it does not exist. Raises ValueError with its name if no file can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
