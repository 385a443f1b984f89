"""Finds files by patterns, with {} for the id, and by lists."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from corrmatch.data.images import DataError, is_image
from corrmatch.paths import expand, read_text

SHOWN = 5  # the number of names in a message
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # contain thumbnails, not images of the user


@dataclass(frozen=True)
class Item:
    """An image, and its mask if it has one."""

    name: str
    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Found:
    """The files that match a pattern, by id, and the names of files that are not images."""

    key: str
    pattern: str
    files: dict[str, Path]
    passed: list[str]

    def note(self) -> list[str]:
        """A line about the files that are not images, or no line."""
        count = len(self.passed)
        return [f"{self.key}: {count} files are no images, passed over: {shorten(self.passed)}"] if count else []


def scan(root: Path, key: str, pattern: str, apart: Collection[Path] = ()) -> Found:
    """Images that match a pattern such as images/{}.*, without those in `apart`.

    {} stands for the id, which may name folders: in `masks/a/mask_b.png` it is `a/b` if `masks/mask_{}.png` is the
    pattern. Other characters are literal; a `.*` at the end is any extension.
    """
    if pattern.count("{}") != 1:
        raise DataError(f"{key}: expected a pattern with one {{}} for the id, got {pattern}")
    before, _, end = pattern.partition("{}")
    folder, start = os.path.split(before)
    base = root / expand(folder)
    found, passed, apart = dict[str, Path](), list[str](), set(apart)

    def unreadable(error: OSError) -> None:
        raise DataError(f"{key}: {error.filename}: cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(base, onerror=unreadable) if os.path.isdir(base) else ():
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in SYSTEM_FOLDERS)
        inside = os.path.relpath(parent, base).replace(os.sep, "/")
        for name in sorted(names):
            file = name if inside == "." else f"{inside}/{name}"
            entry, path = _id(file, start, end), Path(parent, name)
            if entry is None or path in apart:
                continue
            if not is_image(name) or not path.is_file():
                passed.append(file)
            elif entry in found:
                raise DataError(f"{key}: both {found[entry].name} and {name} are there for {entry}")
            elif entry:
                found[entry] = path
    return Found(key, pattern, found, passed)


def _id(file: str, start: str, end: str) -> str | None:
    if end.endswith(".*"):
        file, dot, extension = file.rpartition(".")
        end = end.removesuffix(".*")
        if not dot or "/" in extension:
            return None
    folders, slash, name = file.removesuffix(end).rpartition("/")
    if not file.endswith(end) or not name.startswith(start):
        return None
    return folders + slash + name.removeprefix(start)


def read_list(key: str, root: Path, name: str, images: Found, masks: Found, need_mask: bool) -> list[Item]:
    """The images of a list, with their masks. Where masks are not needed, missing ones are allowed.

    A line is an id, an image where no mask is needed, or an image and a mask, with a tab or blanks between; quotes
    keep a name with blanks together. One DataError names everything that is missing or listed twice.
    """
    path = root / expand(name)
    if not os.path.isfile(path):
        raise DataError(f"{key}: there is no list {path}")
    items, missing = [], []
    for line in read_lines(key, path):
        fields = _fields(line, root, images)
        if len(fields) > 2:
            raise DataError(f"{key}: {path}: expected an id, or an image and a mask with a tab between, got {line!r}")
        entry, *beside = fields
        image = images.files.get(entry) if not beside else None
        image = image or _place(root, entry)
        mask = _place(root, beside[0]) if beside else masks.files.get(entry)
        if need_mask and mask is None and os.path.isfile(image) and entry not in images.files:
            raise DataError(
                f"{key}: {path}: {entry} is an image without its mask; expected an id, or an image and a mask"
            )
        missing += [f"image of {entry}"] if not os.path.isfile(image) else []
        if mask is None or not os.path.isfile(mask):
            missing += [f"mask of {entry}"] if need_mask else []
            mask = None
        items.append(Item(entry, image, mask))
    if missing:
        raise DataError(f"{key}: {path}: not found: {shorten(missing)}")
    if not items:
        raise DataError(f"{key}: {path} is empty")
    same = [item.name for item in items if item.mask is not None and os.path.samefile(item.image, item.mask)]
    if same:
        raise DataError(f"{key}: {path}: images are their own masks: {shorten(same)}")
    twice = [str(image) for image, count in Counter(item.image for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{key}: {path}: more than once: {shorten(twice)}")
    return items


def read_lines(key: str, path: Path) -> list[str]:
    """The lines that are not blank."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise DataError(f"{key}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _fields(line: str, root: Path, images: Found) -> list[str]:
    """Splits a line into an id or a path, or an image and a mask. A name may contain blanks if such a file exists."""
    if line in images.files or os.path.isfile(_place(root, line)):
        return [line]
    if "\t" in line:
        return [field.strip().strip("\"'") for field in line.split("\t") if field.strip()]
    fields = [a or b or c for a, b, c in re.findall(r""""([^"]*)"|'([^']*)'|(\S+)""", line)]
    if len(fields) > 2:
        pairs = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
        there = [list(pair) for pair in pairs if os.path.isfile(_place(root, pair[0]))]
        return there[0] if len(there) == 1 else fields
    return fields


def _place(root: Path, path: str) -> Path:
    return Path(os.path.normpath(root / expand(path)))


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """The first names and the number of the others."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])
