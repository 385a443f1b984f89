"""Decisions of setup.py from its environment, without a build."""

from __future__ import annotations

import ast
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.fixture
def names(monkeypatch, tmp_path):
    """The names that setup.py defines. Its build requirements need not be installed."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for module in ("ninja", "pybind11"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for variable in ("CORRMATCH_BUILD_CUDA", "CORRMATCH_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return runpy.run_path(str(SETUP), run_name="setup")


def arch(number, kind="sm"):
    return f"-gencode=arch=compute_{number},code={kind}_{number}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("80", [arch("80")]),
        ("80;90a", [arch("80"), arch("90a")]),
        ("8.0, 9.0a", [arch("80"), arch("90a")]),
        ("120+PTX", [arch("120"), arch("120", "compute")]),
        ("80;120+PTX", [arch("80"), arch("120"), arch("120", "compute")]),
        ("100f", [arch("100f")]),
        ("native", ["-arch=native"]),
    ],
)
def test_architectures(names, given, expected):
    assert names["Cuda"].gencode(given) == expected


def test_default_architectures(names):
    flags = names["Cuda"].gencode(names["CUDA_ARCHS"])
    assert flags == [*(arch(a) for a in ("80", "86", "89", "90a", "100", "120")), arch("120", "compute")]


@pytest.mark.parametrize(
    ("compiled", "expected"),
    [
        ("75 80 86 87 88 89 90 100 103 110 120 121", "80;86;89;90a;100;120+PTX"),  # CUDA 13
        ("50 70 75 80 86 87 89 90", "80;86;89;90+PTX"),  # CUDA 12.0: PTX of 90a would run on nothing newer
        ("50 70 75 80 86 87", "80;86+PTX"),
        ("", "80;86;89;90a;100;120+PTX"),  # it does not say
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(names, tmp_path, compiled, expected):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{number}\n" for number in compiled.split()))
    nvcc.chmod(0o755)
    assert names["Cuda"].known(str(nvcc), names["CUDA_ARCHS"]) == expected


@pytest.mark.parametrize("given", ["", "80;", "sm_80", "80 90", "all", "+PTX", "-arch=x"])
def test_unreadable_architectures(names, given):
    with pytest.raises(SystemExit, match=r"^CORRMATCH_CUDA_ARCHS: cannot read "):
        names["Cuda"].gencode(given)


@pytest.mark.parametrize("value", ["yes", "2", "off", " 1"])
def test_build_cuda_must_be_0_or_1(names, monkeypatch, value):
    monkeypatch.setenv("CORRMATCH_BUILD_CUDA", value)
    with pytest.raises(SystemExit, match=f"^CORRMATCH_BUILD_CUDA must be 0 or 1, got {value!r}"):
        names["Cuda"].detect()


def test_without_nvcc(names, monkeypatch):
    assert names["Cuda"].detect().status.startswith("not built: no nvcc")
    assert names["Cuda"].detect().nvcc == ""
    monkeypatch.setenv("CORRMATCH_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is neither in CUDA_HOME/bin nor on PATH"):
        names["Cuda"].detect()


def nvcc_in(folder, top, runtime=True):
    """A script that prints its toolkit, as nvcc does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={top}' >&2\n")
    (folder / "nvcc").chmod(0o755)
    (top / "lib64").mkdir(parents=True)
    if runtime:
        (top / "lib64/libcudart_static.a").touch()
    return str(folder / "nvcc")


def test_with_nvcc(names, monkeypatch, tmp_path):
    on_path = nvcc_in(tmp_path, tmp_path / "elsewhere")
    in_home = nvcc_in(tmp_path / "home/bin", tmp_path / "home")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    cuda = names["Cuda"].detect()
    assert cuda.nvcc == on_path
    assert cuda.libraries[:2] == [f"-L{tmp_path}/elsewhere/lib64", "-lcudart_static"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    cuda = names["Cuda"].detect()
    assert cuda.nvcc == in_home
    assert cuda.libraries[0] == f"-L{tmp_path}/home/lib64"
    assert cuda.status == "built for 80;86;89;90a;100;120+PTX"
    assert cuda.flags[:7] == names["Cuda"].gencode(names["CUDA_ARCHS"])
    monkeypatch.setenv("CORRMATCH_CUDA_ARCHS", "90a")
    assert names["Cuda"].detect().flags[0] == arch("90a")
    monkeypatch.setenv("CORRMATCH_BUILD_CUDA", "0")
    assert names["Cuda"].detect().nvcc == ""


def test_toolkit_without_its_static_runtime(names, monkeypatch, tmp_path):
    nvcc_in(tmp_path, tmp_path / "home", runtime=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "no libcudart_static" in names["Cuda"].detect().status
    monkeypatch.setenv("CORRMATCH_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"has no libcudart_static\.a$"):
        names["Cuda"].detect()


@pytest.mark.parametrize(
    "words", ["fatal: Value 'c++20' is not defined for option 'std'", "error: static assertion failed"]
)
def test_an_nvcc_without_the_language(names, monkeypatch, tmp_path, words):
    """The CPU part is built, and a message has the reason why the CUDA part is not."""
    nvcc = nvcc_in(tmp_path / "home/bin", tmp_path / "home")
    script = Path(nvcc).read_text()
    Path(nvcc).write_text(f'{script}case " $* " in *std=c++20*) echo "{words}" >&2; exit 1;; esac\n')
    monkeypatch.setenv("PATH", f"{tmp_path}/home/bin:/bin:/usr/bin")
    cuda = names["Cuda"].detect()
    assert cuda.nvcc == ""
    assert cuda.status.startswith(f"not built: when it was installed, {nvcc} compiles no C++20")
    assert cuda.status.endswith(f": {words}")
    monkeypatch.setenv("CORRMATCH_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"CORRMATCH_BUILD_CUDA=1, but .* compiles no C\+\+20"):
        names["Cuda"].detect()


def test_an_nvcc_that_cannot_be_run(names, monkeypatch, tmp_path):
    nvcc = nvcc_in(tmp_path / "home/bin", tmp_path / "home")
    Path(nvcc).write_text("#!/no/such/interpreter\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/home/bin:/bin:/usr/bin")
    assert names["Cuda"].detect().status.startswith("not built: the toolkit of")


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, "'c++' cannot be run"),
        ("", "'c++' cannot be run"),
        ("gone -O2", "'gone' cannot be run"),
        ("old", "'old' is none"),
    ],
)
def test_without_a_compiler_of_the_language(names, monkeypatch, tmp_path, compiler, said):
    (tmp_path / "old").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old").chmod(0o755)
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", compiler)
    build = names["NinjaBuild"](setuptools.Distribution())
    with pytest.raises(SystemExit, match=r"^corrmatch needs a C\+\+20 compiler") as caught:
        build.build_file(tmp_path / "x.so")
    assert said in str(caught.value)


@pytest.mark.parametrize("given", ["-std=c++17 -O0", "-std=gnu++14", "-fmessage-length=0 -ansi"])
def test_flags_of_the_user_do_not_choose_the_language(names, monkeypatch, tmp_path, given):
    monkeypatch.setenv("CXXFLAGS", given)
    monkeypatch.setitem(names["NinjaBuild"].build_file.__globals__, "accepts", lambda *_: True)
    sys.modules["pybind11"].get_include = lambda: str(tmp_path)
    build = names["NinjaBuild"](setuptools.Distribution())
    build.compiler = types.SimpleNamespace(include_dirs=[])
    (line,) = [line for line in build.build_file(tmp_path / "x.so").splitlines() if line.startswith("flags = ")]
    assert f" {given} " in line
    assert line.endswith(" -std=c++20")


def test_narrowest_instruction_set_first(names):
    """The linker keeps the first of equal inline functions, so no code for a wider instruction set may precede it."""
    variants = names["X86_VARIANTS"]
    assert list(variants) == ["generic", "avx2", "avx512"]
    assert variants["generic"] == []
    assert set(variants["avx2"]) < set(variants["avx512"])


def test_paths_in_ninja_files(names):
    assert names["escape"](Path("/a b/c:d$e")) == "/a$ b/c$:d$$e"


@pytest.mark.parametrize(("jobs", "expected"), [(None, []), ("3", ["-j", "3"])])
def test_max_jobs_is_honoured(names, monkeypatch, tmp_path, jobs, expected):
    commands = []
    sys.modules["ninja"].BIN_DIR = str(tmp_path)
    sys.modules["pybind11"].get_include = lambda: str(tmp_path)
    done = types.SimpleNamespace(returncode=0, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if jobs:
        monkeypatch.setenv("MAX_JOBS", jobs)
    build = names["NinjaBuild"](setuptools.Distribution())
    build.build_temp, build.build_lib, build.inplace = str(tmp_path / "temp"), str(tmp_path / "lib"), False
    build.extensions, build.compiler = [], types.SimpleNamespace(include_dirs=[])
    build.ext_map = {}
    build.build_extension(setuptools.Extension("corrmatch._C", sources=[]))
    assert commands[-1] == [str(tmp_path / "ninja"), "-C", str(tmp_path / "temp"), *expected]
    assert (tmp_path / "temp/build.ninja").exists()


def test_any_reason_reaches_the_compiler(names, monkeypatch, tmp_path):
    """Quotes, backslashes and dollars in nvcc's message pass through ninja, the shell and the compiler."""
    status = "not built: nvcc says \"no\", 'never', $HOME, a\\b, 100 %"
    monkeypatch.setattr(names["Cuda"], "detect", lambda host: names["Cuda"](status))
    monkeypatch.setitem(names["NinjaBuild"].build_file.__globals__, "accepts", lambda *_: True)
    sys.modules["pybind11"].get_include = lambda: str(tmp_path)
    build = names["NinjaBuild"](setuptools.Distribution())
    build.compiler = types.SimpleNamespace(include_dirs=[])
    lines = build.build_file(tmp_path / "x.so").splitlines()
    extra = lines[next(i for i, line in enumerate(lines) if line.startswith("build binding.o:")) + 1]
    words = shlex.split(extra.partition("=")[2].replace("$$", "$"))
    (literal,) = [word.partition("=")[2] for word in words if word.startswith("-DCORRMATCH_CUDA_STATUS=")]
    assert ast.literal_eval(literal) == status
