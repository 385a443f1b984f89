"""Builds CUDA sources for the CPU with the headers in this folder, into Python modules.

`extension()` is csrc/cuda with its binding; `load()` takes anything else that is a pybind11 module.
CORRMATCH_EMULATOR_SEED, or `seed(module, number)`, chooses the schedule of launches. CORRMATCH_EMULATOR_ARCH, looked at
by every call, is the architecture that the device professes: 80, 86, 89 or 90 (the default).
CORRMATCH_EMULATOR_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (of GCC); Python must then
have been started in `sanitized_environment()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11

EMULATOR = Path(__file__).resolve().parent
CSRC = EMULATOR.parents[1] / "csrc"
RUNTIME = [EMULATOR / name for name in ("emulator.cpp", "host.cpp")]

FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DCORRMATCH_EMULATOR=1"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


@functools.cache
def extension() -> ModuleType:
    """The module corrmatch_emulated. Its `cuda` has the content of `cuda` in a CUDA build of corrmatch._C."""
    flags = ["-DCORRMATCH_CUDA=1", '-DCORRMATCH_CUDA_STATUS="emulated on the CPU"']
    return load("corrmatch_emulated", CSRC / "binding.cpp", sorted((CSRC / "cuda").glob("*.cu")), flags)


class Extension:
    """The CUDA operators, which are built at the first access."""

    def __getattr__(self, name: str) -> Any:
        return getattr(extension().cuda, name)


def load(name: str, binding: Path, sources: Sequence[Path], flags: Sequence[str] = ()) -> ModuleType:
    """Imports the module of that name, and builds it first if needed."""
    path = build(name, binding, sources, flags, sanitize=os.environ.get("CORRMATCH_EMULATOR_SANITIZE") == "1")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seed(module: ModuleType, number: int) -> None:
    """Sets the seed of the schedules of all following launches of the module."""
    ctypes.CDLL(module.__file__).corrmatch_emulator_seed(ctypes.c_uint32(number))


def sanitized_environment() -> dict[str, str]:
    """The environment of a child process that loads sanitized modules."""
    # libstdc++ must be there when AddressSanitizer starts, or it cannot see exceptions.
    libraries = [run([*compiler(), f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")]
    return {
        **os.environ,
        "CORRMATCH_EMULATOR_SANITIZE": "1",
        "LD_PRELOAD": ":".join(str(Path(library).resolve()) for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def build(
    name: str, binding: Path, sources: Sequence[Path], flags: Sequence[str] = (), *, sanitize: bool = False
) -> Path:
    """Compiles and links what is not in the cache. If several processes need the same, one builds and the others wait.

    The binding is never sanitized: that takes a compiler longer than all kernels, and finds nothing.
    """
    include = [EMULATOR / "include", CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [*compiler(), *FLAGS, *flags, *(f"-I{path}" for path in include)]
    sanitizers = SANITIZE if sanitize else []
    files = sorted(path for folder in (EMULATOR, CSRC) for path in folder.rglob("*"))
    headers = [path for path in files if path.suffix in (".h", ".hpp", ".cuh", ".def")]
    surroundings = digest(run([*compiler(), "--version"]), pybind11.__version__, *headers)

    def make(stem: str, suffix: str, key: str, command: Sequence[str]) -> Path:
        target = cache() / f"{stem}-{digest(key, shlex.join(command))}{suffix}"
        if not target.exists():
            temporary = target.with_name(f"{os.getpid()}-{target.name}")
            run([*command, "-o", str(temporary)])
            temporary.replace(target)  # complete, or not there
        return target

    def compile(source: Path) -> str:
        extra = [] if source == binding else sanitizers
        key = digest(surroundings, source)
        return str(make(source.stem, ".o", key, [*command, *extra, "-x", "c++", "-c", str(source)]))

    with locked(), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = pool.map(compile, [binding, *sources, *RUNTIME])
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return make(name, suffix, "", [*command, *sanitizers, "-shared", *objects])


@functools.cache
def compiler() -> list[str]:
    """The command of the C++ compiler, chosen as setup.py does."""
    return shlex.split(os.environ.get("CXX", "g++" if shutil.which("g++") else "c++"))


def run(command: Sequence[str]) -> str:
    """The output of the command. An error is raised with its messages."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout


def digest(*parts: str | Path) -> str:
    """A name for these texts and the contents of these files."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


@functools.cache
def cache() -> Path:
    """A folder of this user."""
    folder = Path(tempfile.gettempdir()) / f"corrmatch-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    return folder


@contextlib.contextmanager
def locked():
    """Makes other processes wait for the build."""
    with open(cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
