"""The steps of the GPU suite: order, time limits and commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 8  # processes of the tests; each has a context and oracles on the same GPU
LARGE = 64 * 2**30  # bytes of a GPU with room for the oracle of eight images of 101 x 101

# The ops are found by their files. These are not imported, because corrmatch is not built yet.
OPS = tuple(sorted(path.stem for path in (ROOT / "benchmarks/ops").glob("[!_]*.py")))
MASKS, COMPONENTS = ("region_masks", "region_propagate"), ("connected_components",)  # ops with separate steps
# The other ops are timed in one step, in float32. pixel_propagate comes last, because its peers are the slowest.
SINGLE = sorted({*OPS} - {*MASKS, *COMPONENTS}, key=lambda op: (op == "pixel_propagate", op))
LIMITS = {  # seconds that a step may take, in the order of the run; the most valuable steps come first
    "build": 150,
    "build-without-cuda": 60,  # only if the first failed, so that Triton's kernels can be measured
    "device": 120,  # the first import of torch, from a cold disk
    "tests-core": 75,
    "ops-bfloat16": 240,  # mostly for compiled peers, which come last
    "regions-masks": 45,
    "regions-components": 45,
    "train": 90,
    "ops-float32": 90,
    "tests-rest": 150,
    "tests-sanitizer": 60,
}

TRAINER = ("timm", "omegaconf", "yaml", "accelerate", "torchmetrics", "torchvision")
DEVICE = """import json, sys
from harness import machine
with open(sys.argv[2], "w") as file:
    json.dump(machine.environment(sys.argv[1]), file)"""

# Files of tests and an expression for -k. With a GPU: first tests that only a GPU can run, then all tests that use it.
# Without: some tests that use the interpreter and the emulator in the same way.
MORE = ("pixel_propagate_layout", "backend", "cuda_kernels", "golden", "threads", "transforms")
TESTS = {
    "tests-core": (["test_gpu.py"], ""),
    "tests-rest": ([f"test_{name}.py" for name in (*OPS, *MORE)], "triton or cuda or opcheck"),
    "tests-sanitizer": (
        ["test_region_masks.py", "test_region_propagate.py", "test_connected_components.py"],
        "cuda and (index or sizes or leading)",
    ),
}
DRY_TESTS = {
    "tests-core": (["test_pixel_propagate.py"], "triton and scale"),
    "tests-rest": (["test_region_masks.py", "test_pseudo_label.py"], "cuda and index or triton and ties"),
    "tests-sanitizer": (["test_region_propagate.py"], "cuda and sizes"),
}


@dataclass
class SuiteStep:
    """A process of the suite.

    Attributes:
        name: Name of the step and its files. It begins with the part, up to the first hyphen.
        command: Program and arguments.
        folder: Working directory.
        environment: Additional variables of the environment.
        needs: Modules that the step requires.
        tool: A program; without it the step is left out.
    """

    name: str
    command: list[str]
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    tool: str | None = None

    @property
    def part(self) -> str:
        """Its part, a name for `--only`."""
        return self.name.split("-")[0]


def architectures() -> str | None:
    """The architectures of the GPUs in this machine, from their driver; None if it does not report them.

    "native" of nvcc would only warn if it finds no GPU, and use its oldest architecture.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = sorted({line.strip().replace(".", "") for line in done.stdout.splitlines()})
    if not found or not all(number.isdecimal() for number in found):
        return None
    return ";".join("90a" if number == "90" else number for number in found)


class Schedule:
    """Makes the steps: full ones on a GPU, tiny ones on a CPU in a dry run. `site` is the folder of the build."""

    def __init__(self, out: Path, dry: bool, site: Path):
        self.out, self.dry, self.site = out, dry, site
        self.device = "cpu" if dry else "cuda"

    def file(self, name: str, suffix: str = ".json") -> Path:
        """The file that a step writes in addition to its log."""
        return self.out / "runs" / f"{name}{suffix}"

    def build(self, name: str, cuda: bool) -> SuiteStep:
        """The build: pip without isolation and without an index. A dry run stops before compilation."""
        options = ["--dry-run"] if self.dry else ["--target", str(self.site)]
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", *options]
        variables = {"CORRMATCH_BUILD_CUDA": str(int(cuda))}
        archs = None if self.dry or "CORRMATCH_CUDA_ARCHS" in os.environ else architectures()
        if archs is not None:
            variables["CORRMATCH_CUDA_ARCHS"] = archs
        return SuiteStep(name, [*command, str(ROOT)], environment=variables, needs=("pip", "pybind11", "ninja"))

    def probe(self) -> SuiteStep:
        """The step that records machine and software."""
        command = [sys.executable, "-c", DEVICE, self.device, str(self.file("device"))]
        return SuiteStep("device", command, ROOT / "benchmarks")

    def tests(self, name: str, workers: int = 0, tool: tuple[str, ...] = (), **variables: str) -> SuiteStep:
        """A run of tests, in their folder, because the source tree has no extension."""
        files, expression = (DRY_TESTS if self.dry else TESTS)[name]
        command = [*([] if self.dry else tool), sys.executable, "-m", "pytest", "-q", *files, "-k", expression]
        command += ["-o", "addopts=--import-mode=importlib", f"--junitxml={self.file(name, '.xml')}"]
        if workers > 1 and not self.dry and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(workers)]
        return SuiteStep(name, command, ROOT / "tests", variables, ("pytest", "hypothesis"), tool[0] if tool else None)

    def corr(self, name: str, *arguments: str) -> SuiteStep:
        """A run of bench_corr."""
        tiny = ["--sizes", "5", "--batch", "1", "--budget", "0.2"] if self.dry else []
        command = [sys.executable, "benchmarks/bench_corr.py", "--device", self.device, "--json", str(self.file(name))]
        return SuiteStep(name, [*command, *arguments, *tiny])

    def train(self) -> SuiteStep:
        """A run of bench_train."""
        tiny = ["--crop", "33", "--channels", "8", "--backbone", "test_resnet", "--budget", "0.2"]
        command = [sys.executable, "benchmarks/bench_train.py", "--device", self.device, "--budget", "30"]
        command += ["--variants", "bf16", "channels_last"]
        command += ["--json", str(self.file("train")), *(tiny if self.dry else [])]
        return SuiteStep("train", command, needs=TRAINER)

    def steps(self, memory: int) -> list[SuiteStep]:
        """The steps after build and device, in order."""
        workers = min(WORKERS, len(os.sched_getaffinity(0)))
        batch = ["--batch", "8"] if memory >= LARGE else []
        half = ["--ops", "pixel_propagate", "--dtype", "bfloat16", *batch, "--budget", "30"]
        memcheck = ("compute-sanitizer", "--target-processes=all", "--report-api-errors=no", "--error-exitcode=86")
        return [
            self.tests("tests-core", workers),
            self.corr("ops-bfloat16", *half, "--sizes", "101,65,41"),
            self.corr("regions-masks", "--ops", ",".join(MASKS), "--budget", "10"),
            self.corr("regions-components", "--ops", ",".join(COMPONENTS), "--budget", "10"),
            self.train(),
            self.corr("ops-float32", "--ops", ",".join(SINGLE), "--sizes", "41,65", "--budget", "15"),
            self.tests("tests-rest", workers),
            # Without its cache torch allocates each tensor by the driver, so the tool knows the end of each tensor.
            self.tests("tests-sanitizer", tool=memcheck, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        ]
