"""Builds corrmatch._C from csrc/ with ninja. Project metadata lives in pyproject.toml.

Environment:
  MAX_JOBS               number of parallel compiler processes (default: ninja's own choice)
  CORRMATCH_BUILD_CUDA   0: leave the CUDA kernels out; 1: fail without nvcc; unset: build them where nvcc is found
  CORRMATCH_CUDA_ARCHS   architectures, e.g. "80;90a;120+PTX" (default: those below that nvcc knows) or "native"
  CUDA_HOME              where nvcc is looked for before PATH
  CXX, CXXFLAGS, LDFLAGS as usual; nvcc gets CXX as its host compiler
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "80;86;89;90a;100;120+PTX"

# Every file of csrc/cpu but the dispatcher is compiled once for each of these; the processor chooses at run time.
# Order matters for the linker: where two variants hold the same inline function it keeps the first, so the narrowest
# instruction set comes first and no wider code leaks into it.
GENERIC = {"generic": []}
X86_VARIANTS = {
    **GENERIC,
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
X86_VARIANTS["avx512"] = X86_VARIANTS["avx2"] + X86_VARIANTS["avx512"]


@dataclass
class Cuda:
    """Whether the CUDA kernels are built, and with what."""

    status: str  # shown by `python -m corrmatch info`
    nvcc: str = ""
    flags: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)  # linker flags

    @classmethod
    def detect(cls, host: Sequence[str] = ()) -> Cuda:
        """Follows CORRMATCH_BUILD_CUDA, CUDA_HOME and PATH; `host` are nvcc's flags for the host compiler."""
        wanted = os.environ.get("CORRMATCH_BUILD_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"CORRMATCH_BUILD_CUDA must be 0 or 1, got {wanted!r}")
        if wanted == "0":
            return cls("not built: CORRMATCH_BUILD_CUDA=0 when it was installed")
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
        nvcc = nvcc or shutil.which("nvcc")
        if nvcc is None:
            if wanted == "1":
                raise SystemExit("CORRMATCH_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH")
            return cls("not built: no nvcc in CUDA_HOME/bin or on PATH when it was installed")
        folder = cls.runtime(nvcc)
        if folder is None:
            if wanted == "1":
                raise SystemExit(f"CORRMATCH_BUILD_CUDA=1, but the toolkit of {nvcc} has no libcudart_static.a")
            return cls(f"not built: the toolkit of {nvcc} had no libcudart_static.a when it was installed")
        archs = os.environ.get("CORRMATCH_CUDA_ARCHS") or cls.known(nvcc, CUDA_ARCHS)
        flags = [*cls.gencode(archs), "-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        complaint = cls.complaint(nvcc, host)
        if complaint is not None:
            reason = (
                f"{nvcc} compiles no C++20, as that of CUDA 12.0 and newer does with a compiler it knows: {complaint}"
            )
            if wanted == "1":
                raise SystemExit(f"CORRMATCH_BUILD_CUDA=1, but {reason}")
            return cls(f"not built: when it was installed, {reason}")
        # The runtime is static, so that the wheel needs nothing of CUDA but the driver.
        libraries = [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return cls(f"built for {archs}", nvcc, flags, libraries)

    @staticmethod
    def runtime(nvcc: str) -> Path | None:
        """Folder of the static CUDA runtime. nvcc may be a link or a script: it says itself where its toolkit is."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cu"
            source.touch()
            done = run([nvcc, "--dryrun", str(source)], folder)
        top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
        if top is None:
            return None
        found = (Path(top[1]) / lib for lib in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"))
        return next((lib.resolve() for lib in found if (lib / "libcudart_static.a").exists()), None)

    @staticmethod
    def complaint(nvcc: str, host: Sequence[str]) -> str | None:
        """What nvcc or its host compiler says of a little C++20; None where it compiles."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cu"
            source.write_text("#include <concepts>\nstatic_assert(std::integral<int>);\n__global__ void kernel() {}\n")
            done = run([nvcc, *host, "-std=c++20", "-c", str(source), "-o", "probe.o"], folder)
        if done.returncode == 0:
            return None
        lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("error|fatal", line, re.I)]
        return " ".join(lines[0].split()) if lines else f"it ended with exit code {done.returncode}"

    @staticmethod
    def known(nvcc: str, archs: str) -> str:
        """Those of the architectures that this nvcc supports. A toolkit does not support later GPUs."""
        done = run([nvcc, "--list-gpu-arch"])
        compiled = set(re.findall(r"compute_(\d+)", done.stdout))
        numbers = {arch: arch.removesuffix("+PTX").rstrip("af") for arch in archs.split(";")}
        kept = [arch for arch, number in numbers.items() if number in compiled]
        if not kept or kept[-1].endswith("+PTX"):
            return ";".join(kept) or archs
        return ";".join([*kept[:-1], f"{numbers[kept[-1]]}+PTX"])  # for GPUs that are newer than all of them

    @staticmethod
    def gencode(archs: str) -> list[str]:
        """Flags of nvcc for a list like "80;90a;120+PTX", or "native"."""
        if archs == "native":
            return ["-arch=native"]
        flags = []
        for arch in archs.replace(",", ";").split(";"):
            number = arch.strip().removesuffix("+PTX").replace(".", "")
            if not number.rstrip("af").isdigit():
                raise SystemExit(f"CORRMATCH_CUDA_ARCHS: cannot read {arch!r}; expected '80;90a;120+PTX' or the like")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.strip().endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program; one that is not there, or cannot be run, has failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def accepts(compiler: list[str], *flags: str) -> bool:
    """Whether the compiler builds and links an empty program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix(""))]
        return run(command).returncode == 0


class NinjaBuild(build_ext):
    """Writes one build.ninja for the extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links what changed."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.build_file(target))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        jobs = os.environ.get("MAX_JOBS")
        if jobs:
            command += ["-j", jobs]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(
                "corrmatch: compiling csrc/ failed; the compiler's message stands above. Where it is nvcc's, "
                "CORRMATCH_BUILD_CUDA=0 leaves the CUDA kernels out"
            )

    def build_file(self, target: Path) -> str:
        """The text of build.ninja."""
        named = os.environ.get("CXX", "").strip()
        compiler = shlex.split(named or ("g++" if shutil.which("g++") else "c++"))
        if not accepts(compiler, "-std=c++20"):
            found = "cannot be run" if shutil.which(compiler[0]) is None else "is none"
            raise SystemExit(
                f"corrmatch needs a C++20 compiler (GCC 11, Clang 14 or newer); {compiler[0]!r} {found}. "
                "Install one, such as Debian's g++, or name it in CXX"
            )
        x86 = platform.machine() in ("x86_64", "AMD64")
        openmp = ["-fopenmp"] if accepts(compiler, "-fopenmp") else []
        host = [word for word in compiler if not word.startswith("-")][-1:]  # behind ccache, say
        ccbin = [f"-ccbin={host[0]}"] if named and "NVCC_CCBIN" not in os.environ else []
        cuda = Cuda.detect(ccbin)
        print(f"corrmatch: CUDA kernels {cuda.status}", flush=True)

        flags = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *openmp]
        flags += [f"-I{path}" for path in (pybind11.get_include(), *self.compiler.include_dirs)]
        flags += ["-DCORRMATCH_X86"] if x86 else []
        link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        link += [*openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]

        rules, objects = [], []

        def edge(rule: str, source: Path, name: str, extra: list[str]) -> None:
            rules.append(f"build {name}.o: {rule} {escape(source)}\n  extra = {' '.join(extra)}")
            objects.append(f"{name}.o")

        define = f"-DCORRMATCH_CUDA_STATUS={json.dumps(cuda.status)}"  # a literal of C++ as well
        with_cuda = ["-DCORRMATCH_CUDA"] if cuda.nvcc else []
        edge("cxx", ROOT / "csrc/binding.cpp", "binding", [shlex.quote(define).replace("$", "$$"), *with_cuda])
        edge("cxx", ROOT / "csrc/cpu/dispatch.cpp", "dispatch", [])
        sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        for variant, variant_flags in (X86_VARIANTS if x86 else GENERIC).items():
            for source in sources:
                if source.name != "dispatch.cpp":
                    name = f"{variant}/{source.stem}"
                    edge("cxx", source, name, [f"-DCORRMATCH_ISA={variant}", *variant_flags])
        if cuda.nvcc:
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                edge("nvcc", source, f"cuda/{source.stem}", [])
            link += cuda.libraries

        cxx = shlex.join(compiler)
        nvcc = shlex.join([cuda.nvcc, *ccbin, *cuda.flags])
        return "\n".join(
            [
                f"cxx = {cxx}",
                f"flags = {shlex.join(flags)} {os.environ.get('CXXFLAGS', '')} -std=c++20",  # whatever CXXFLAGS says
                f"link = {shlex.join(link)}",
                "rule cxx\n  command = $cxx -MD -MF $out.d $flags $extra -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc\n  description = $out",
                f"rule nvcc\n  command = {nvcc} -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc\n  description = $out",
                "rule link\n  command = $cxx $in $link -o $out\n  description = $out",
                *rules,
                f"build {escape(target)}: link {' '.join(objects)}",
                f"default {escape(target)}",
                "",
            ]
        )


def escape(path: Path) -> str:
    """A path as a word of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class LinkedSources(sdist):
    """Packs a link to a folder as the link that it is. setuptools would pack what it leads to a second time."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Makes the folder that is packed."""
        links = {folder for file in files for folder in Path(file).parents if folder.is_symlink()}
        super().make_release_tree(base_dir, [file for file in files if links.isdisjoint(Path(file).parents)])
        for link in links:
            (Path(base_dir) / link).symlink_to(link.readlink())


setup(
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    ext_modules=[Extension("corrmatch._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "sdist": LinkedSources},
)
