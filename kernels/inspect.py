"""Compiles every kernel configuration ahead of time, without a GPU, and prints what the machine code costs.

    python -m corrmatch.kernels.inspect [--arch 80 90 100] [--dtype bfloat16 float16 float32] [--channels 21]

The columns are registers a thread, spilled bytes, shared memory and the kind of matrix instruction. Three columns count
instructions of the inner loop for each element of the scores: all of them (slots; an H100 has 8 in the time of one
exponential), exponentials, and divisions or logarithms. Three count instructions in one turn of that loop: asynchronous
copies, synchronous loads, and fences. The last column is the number of blocks that fit on a multiprocessor of an H100.
Kernels that are linear in the positions have no such loop.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import corrmatch.kernels
from corrmatch.kernels.configs import Tile
from corrmatch.kernels.launch import Variant
from corrmatch.kernels.plan import Plan

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MATRIX = r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b"


@dataclass(frozen=True)
class Loop:
    """Instructions of the inner loop for each element of its score tile."""

    slots: float
    exponentials: float
    divisions: float
    copies: int  # asynchronous loads into shared memory, of a thread in one turn
    loads: int  # synchronous loads
    fences: int  # memory barriers


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture."""

    kernel: str
    arch: int
    dtype: str
    tile: str
    warps: int
    registers: int
    spilled: int
    shared: int
    matrix: str
    loop: Loop | None

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor of an H100, with 65,536 registers and 228 KiB of shared memory."""
        allotted = (self.registers + 7) // 8 * 8 * 32 * self.warps
        return min(65536 // allotted, 228 * 1024 // (self.shared + 1024), 64 // self.warps)

    @property
    def sound(self) -> bool:
        """Whether no register spills and all products are matrix instructions."""
        return self.spilled == 0 and (self.loop is None or self.matrix != "none")

    def __str__(self) -> str:
        line = (
            f"{self.kernel:22} sm_{self.arch:<4} {self.dtype:9} {f'{self.tile}, {self.warps} warps':15} "
            f"{self.registers:9} {self.spilled:8} {self.shared / 1024:8.1f}"
        )
        if self.loop is not None:
            line += f"  {self.matrix:15} {self.loop.slots:5.1f}"
            line += f" {self.loop.exponentials:11.2f} {self.loop.divisions:10.2f}"
            line += f" {self.loop.copies:6} {self.loop.loads:5} {self.loop.fences:6} {self.blocks:6}"
        return line


HEADER = (
    f"{'kernel':22} {'arch':7} {'dtype':9} {'tile':15} {'registers':>9} {'spilled':>8} {'shared K':>8}  "
    f"{'matrix':15} {'slots':>5} {'exp/element':>11} {'div, log':>10} {'copies':>6} {'loads':>5} {'fences':>6} "
    f"{'blocks':>6}"
)


def variants(plan: Plan, channels: int) -> Iterator[Variant]:
    """The variants of all kernels. Each module of kernels lists its own."""
    for module in pkgutil.iter_modules(corrmatch.kernels.__path__):
        if module.name != Path(__file__).stem:
            found = importlib.import_module(f"corrmatch.kernels.{module.name}")
            yield from found.variants(plan, channels) if hasattr(found, "variants") else ()


def compile_all(arch: int, dtype: str, channels: int) -> Iterator[Compiled]:
    """Compiles all kernels for a problem with so many channels of query and of value."""
    for variant in variants(Plan.on(arch, getattr(torch, dtype), channels), channels):
        yield compile_one(variant.name, variant.kernel, arch, dtype, variant.constants, variant.tile)


def compile_one(
    name: str, kernel: Any, arch: int, dtype: str, constants: dict[str, Any], tile: Tile | None
) -> Compiled:
    """Compiles one kernel and reads its PTX, its machine code and the assembler's report."""
    if tile is not None:
        constants = constants | {"ROWS": tile.rows, "COLUMNS": tile.columns}
    signature, attributes = {}, {}
    numbers = {"data": DTYPES[dtype], "packed": "bf16" if dtype == "float32" else DTYPES[dtype]}
    for parameter in kernel.params:
        argument, aligned = parameter.name, False
        if argument.isupper():
            signature[argument] = "constexpr"
        elif argument in kernel.pointers:
            signature[argument] = "*" + numbers.get(kernel.pointers[argument], kernel.pointers[argument])
            aligned = not parameter.do_not_specialize_on_alignment
        else:
            signature[argument] = "fp32" if argument in kernel.floats else parameter.annotation_type or "i32"
            aligned = not parameter.do_not_specialize and signature[argument] == "i32"  # padded positions
        if aligned:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    source = ASTSource(kernel, signature, constants, attributes)
    warps, stages = (4, 2) if tile is None else (tile.warps, tile.stages)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    registers, spilled, sass = assembled(ptx, arch)
    matrix, loop, shape = "", None, str(constants.get("BLOCK", constants.get("CELLS")))
    if tile is not None:
        shape = f"{tile.rows}x{tile.columns}x{tile.stages}"
        body, machine_body = inner_loop(ptx), inner_loop(sass)
        per_element = 32 * warps / (tile.rows * tile.columns)
        matrix = next(iter(re.findall(MATRIX, body)), "none")
        loop = Loop(
            len(re.findall(r"/\*[0-9a-f]{4,}\*/", machine_body)) * per_element,
            len(re.findall(r"\bex2\.approx", body)) * per_element,
            len(re.findall(r"\b(?:div|rcp|lg2|sqrt)\.", body)) * per_element,
            len(re.findall(r"\bLDGSTS\b", machine_body)),
            len(re.findall(r"\bLDG\b", machine_body)),
            len(re.findall(r"\bMEMBAR\b", machine_body)),
        )
    return Compiled(name, arch, dtype, shape, warps, registers, spilled, made.metadata.shared, matrix, loop)


def inner_loop(code: str) -> str:
    """The longest part of PTX or SASS between a label and a branch back to it."""
    lines = code.splitlines()
    labels = {line.split(":")[0].strip(): n for n, line in enumerate(lines) if re.match(r"\s*[$.]L\w+:", line)}
    longest = ""
    for n, line in enumerate(lines):
        branch = re.search(r"\bbra\b[^$`]*[`(]*([$.]L\w+)", line, re.IGNORECASE)
        if branch and labels.get(branch[1], n) < n:
            body = "\n".join(lines[labels[branch[1]] : n])
            longest = max(longest, body, key=len)
    return longest


def assembled(ptx: str, arch: int) -> tuple[int, int, str]:
    """Registers a thread and spilled bytes from the report of ptxas, and the machine code."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = folder / ("ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas")
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    if target is None:
        raise ValueError("ptx: expected a .target directive, got none")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(folder / "nvdisasm"), "-c", str(path.with_suffix(".cubin"))]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise ValueError(f"ptxas: expected registers and spills in its report, got {report!r}")
    return int(registers[1]), int(spills[1]) + int(spills[2]), sass


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the exit code is 1 if a kernel spills or lacks matrix instructions."""
    parser = argparse.ArgumentParser(prog="python -m corrmatch.kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--channels", type=int, default=21)
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}, D = C = {options.channels}")
    print(HEADER)
    failed = False
    for arch in options.arch:
        for dtype in options.dtype:
            for compiled in compile_all(arch, dtype, options.channels):
                print(compiled, flush=True)
                failed |= not compiled.sound
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
