"""The `corrmatch` command."""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch

import corrmatch


def info() -> str:
    """What is installed, which backends can run and why others cannot."""
    lines = [
        f"corrmatch {corrmatch.__version__}",
        f"python    {platform.python_version()} on {platform.machine()} {platform.system()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        f"device    {_device()}",
        "",
        "backend    available  ops",
    ]
    for backend in corrmatch.backends().values():
        note = backend.missing or ", ".join(sorted(backend.ops))
        lines.append(f"{backend.name:<10} {'yes' if backend.available else 'no':<10} {note}")
        if backend.available and backend.detail:
            lines.append(f"{'':<21} ({backend.detail})")
    lines.append("")
    variables = ("CORRMATCH_BACKEND", "CORRMATCH_CHECK")
    lines += [f"{variable:<18} {os.environ.get(variable, 'not set')}" for variable in variables]
    return "\n".join(lines)


def _device() -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"no GPU ({built})"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="corrmatch", description=corrmatch.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=corrmatch.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, which backends can run and why others cannot")
    parser.parse_args(arguments)
    sys.stdout.write(info() + "\n")
    return 0
