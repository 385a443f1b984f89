"""Content of the source distribution, and Python files of the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# Tracked files that are useful only in the repository.
LEFT_OUT = {".gitignore", ".ci/run", ".ci/packages", ".pre-commit-config.yaml", ".github/workflows/ci.yml"}
# Written by setuptools.
WRITTEN = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, and their names."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("the packed files are compared with those of a git checkout, and this is none")
    folder, names = tmp_path_factory.mktemp("checkout"), {name for name in listed.stdout.split("\0") if name}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder, names


def setup(folder, *arguments):
    done = subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_source_distribution_has_everything_that_is_tracked(checkout, tmp_path):
    folder, names = checkout
    setup(folder, "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2]: member for member in tar if not member.isdir()}
    packed = {name: member for name, member in packed.items() if not name.startswith("corrmatch.egg-info/")}
    assert set(packed) == names - LEFT_OUT | WRITTEN
    links = {name: member.linkname for name, member in packed.items() if member.issym()}
    assert links == {name: os.readlink(folder / name) for name in names if (folder / name).is_symlink()}
    assert links == {"corrmatch/kernels": "../kernels", "corrmatch/configs": "../configs"}


def test_wheel_has_the_package_and_nothing_else(checkout, tmp_path):
    folder, names = checkout
    setup(folder, "build_py", "--build-lib", str(tmp_path))
    packed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    files = {name for name in names if not (folder / name).is_symlink()}
    rooms = {"corrmatch/": "corrmatch/", "kernels/": "corrmatch/kernels/", "configs/": "corrmatch/configs/"}
    expected = {to + name.removeprefix(room) for room, to in rooms.items() for name in files if name.startswith(room)}
    assert packed == expected
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert {"corrmatch/py.typed", "corrmatch/_C.pyi", "corrmatch/configs/sample.yaml"} <= packed


def test_figures_of_importing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/bench_install.py"), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^import corrmatch after torch: \d+ ms", done.stdout, re.MULTILINE)
