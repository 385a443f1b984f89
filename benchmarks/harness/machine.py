"""The machine and the software of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import corrmatch

EXP2_A_CLOCK = 16  # of one multiprocessor, on every architecture since sm_70
CLOCKS = {  # queries of nvidia-smi
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "celsius": "temperature.gpu",
}


def environment(device: str) -> dict[str, Any]:
    """The environment of a measurement. `bench_corr` documents the fields."""
    state = clocks(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "device_type": device,
        "gpu": _gpu() if device == "cuda" else None,
        "clocks": state,
        "threads": torch.get_num_threads(),
        "load": load(),
        "backends": {b.name: b.detail for b in corrmatch.backends().values() if b.available},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("CORRMATCH_", "TRITON_"))},
        "corrmatch": corrmatch.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "exponentials_a_second": exponentials_a_second(state),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def clocks(device: str) -> dict[str, float | None] | None:
    """Present clocks, power and temperature of the current GPU, each None if unknown; None on a CPU."""
    if device != "cuda":
        return None
    return dict(zip(CLOCKS, map(_number, _query(*CLOCKS.values())), strict=True))


def exponentials_a_second(state: dict[str, float | None] | None) -> float | None:
    """Exponentials a second of the GPU at its highest clock; None on a CPU or if unknown."""
    if state is None or state["sm_max_mhz"] is None:
        return None
    return EXP2_A_CLOCK * torch.cuda.get_device_properties().multi_processor_count * 1e6 * state["sm_max_mhz"]


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "driver": _query("driver_version")[0],
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _query(*fields: str) -> list[str | None]:
    """Answers of nvidia-smi about the current GPU. Its settings are never changed."""
    if shutil.which("nvidia-smi") is None:
        return [None] * len(fields)
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", device, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [x.strip() for x in done.stdout.split(",")]
    return list(found) if done.returncode == 0 and len(found) == len(fields) else [None] * len(fields)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "[N/A]"
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load() -> float | None:
    """The load average over the last minute; None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout of this file, and whether files differ from it; None outside of a checkout.

    CORRMATCH_COMMIT takes its place for sources that were copied without their history.
    """
    if os.environ.get("CORRMATCH_COMMIT"):
        return os.environ["CORRMATCH_COMMIT"]
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit if commit is None or not changed else f"{commit}, modified"
