"""Available backends, and the choice of one for a call."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import OPS

import corrmatch
from corrmatch import _C, ops
from corrmatch.ops import backend as backends_module
from corrmatch.ops.backend import Backend, Implementation, choose

X = torch.zeros(1)
TRITON = corrmatch.backends()["triton"]
ALL_OPS = {name for backend in corrmatch.backends().values() for name in backend.ops}


def test_the_cpu_and_the_reference_have_every_op():
    found = corrmatch.backends()
    for name in ("cpu", "reference"):
        assert found[name].available
        assert found[name].ops == ALL_OPS
    assert set(ops.__all__) - {"correlation_rows"} == {name for op in ALL_OPS for name in OPS[op].FUNCTIONS}


def test_what_is_missing_says_why():
    for backend in corrmatch.backends().values():
        assert backend.available or len(backend.missing) > 10


@pytest.mark.parametrize(
    ("name", "sources"), [("cpu", "csrc/cpu/*.cpp"), ("cuda", "csrc/cuda/*.cu"), ("triton", "kernels/*.py")]
)
def test_an_op_has_the_same_file_name_in_every_room(name, sources):
    root = Path(__file__).resolve().parents[1]
    served = {path.stem for path in root.glob(sources)} & ALL_OPS
    assert served == corrmatch.backends()[name].ops
    assert {path.stem for path in (root / "corrmatch/ops").glob("*.py")} >= served


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_instruction_sets_of_this_processor():
    """All instruction sets of this processor are tested."""
    lines = (line.split() for line in Path("/proc/cpuinfo").read_text().splitlines())
    flags = next((set(line) for line in lines if line[:1] == ["flags"]), set())
    expected = ["generic"]
    if {"avx2", "fma", "bmi1", "bmi2"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected.append("avx512")
    assert _C.cpu.isas() == expected


def test_selection_of_an_instruction_set():
    before = _C.cpu.isa()
    assert before == _C.cpu.isas()[-1]
    for isa in _C.cpu.isas():
        _C.cpu.select_isa(isa)
        assert _C.cpu.isa() == isa
        assert corrmatch.backends()["cpu"].detail.startswith(f"{isa} of ")
    with pytest.raises(ValueError, match="sse9"):
        _C.cpu.select_isa("sse9")
    assert _C.cpu.isa() == _C.cpu.isas()[-1]
    _C.cpu.select_isa(before)


def test_best_available_by_default():
    for op in ALL_OPS:
        assert choose(op, None, X) == "cpu"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("CORRMATCH_BACKEND", "reference")
    assert choose("pixel_propagate", None, X) == "reference"
    assert choose("pixel_propagate", "cpu", X) == "cpu"  # the argument has priority
    monkeypatch.setenv("CORRMATCH_BACKEND", "")
    assert choose("pixel_propagate", None, X) == "cpu"
    monkeypatch.setenv("CORRMATCH_BACKEND", "gpu")
    for op in ALL_OPS:
        with pytest.raises(ValueError, match=r"^backend: expected one of .*, got 'gpu'$"):
            choose(op, None, X)


def test_environment_variable_counts_for_the_ops_of_its_backend(monkeypatch):
    implementations = {"pixel_propagate": Implementation(print)}
    some = Backend("some", None, implementations)
    absent = Backend("absent", None, implementations, "it was never built")
    elsewhere = Backend("elsewhere", ("cuda", "xpu"), implementations)
    known = (some, absent, elsewhere, *corrmatch.backends().values())
    monkeypatch.setattr(backends_module, "_BACKENDS", known)
    monkeypatch.setattr(backends_module, "NAMES", tuple(backend.name for backend in known))
    for name in ("some", "absent", "elsewhere"):
        monkeypatch.setenv("CORRMATCH_BACKEND", name)
        assert choose("region_masks", None, X) == "cpu"
        reason = "it was never built" if name == "absent" else "it has no region_masks"
        with pytest.raises(ValueError, match=f"^backend: '{name}' cannot serve region_masks: {reason}$"):
            choose("region_masks", name, X)
    monkeypatch.setenv("CORRMATCH_BACKEND", "absent")
    with pytest.raises(ValueError, match=r"^backend: 'absent' cannot serve pixel_propagate: it was never built$"):
        choose("pixel_propagate", None, X)
    with pytest.raises(ValueError, match=r"it takes tensors on cuda or xpu, not on cpu$"):
        choose("pixel_propagate", "elsewhere", X)
    monkeypatch.delenv("CORRMATCH_BACKEND")
    assert choose("pixel_propagate", None, X) == "some"


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


MAPS, INDEX = [zeros(1, 1, 2, 2)] * 3, torch.zeros(1, dtype=torch.int64)
WITHOUT_FLOAT64 = {
    "triton": lambda: ops.pixel_propagate(*MAPS, backend="triton"),
    "cuda": lambda: ops.region_masks(*MAPS[:2], INDEX, (3, 3), backend="cuda"),
}


@pytest.mark.parametrize("name", WITHOUT_FLOAT64)
def test_refusal_says_why(name):
    backend, call = backends_module._BACKENDS[backends_module.NAMES.index(name)], WITHOUT_FLOAT64[name]
    reason = backend.missing or ("does not take float64" if backend.devices == ("cpu",) else "not on cpu")
    with pytest.raises(ValueError, match=f"^backend: '{name}' cannot serve .*{re.escape(reason)}"):
        call()


@pytest.mark.skipif(not TRITON.available, reason=str(TRITON.missing))
def test_triton_refuses_too_many_channels():
    x = torch.zeros(1, 257, 2, 2, device=TRITON.devices[0])
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot serve .*at most 256 channels, not 257"):
        ops.pixel_propagate(x, x, x, backend="triton")


@pytest.mark.parametrize(("major", "minor", "served"), [(7, 5, False), (8, 0, True), (12, 0, True)])
def test_gpus_that_are_too_old_are_refused(monkeypatch, major, minor, served):
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    kernels = Backend("kernels", ("cuda",), {"region_masks": Implementation(print, capability=80)})
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    reason = None if served else f"it takes GPUs of compute capability 8.0 or more, not {major}.{minor}"
    assert kernels.refusal("region_masks", gpu) == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shared", "served"), [(99, False), (163, True), (227, True)])
def test_channels_that_do_not_fit_the_shared_memory_are_refused(monkeypatch, dtype, shared, served):
    """Refuses before the forward, by the needs of the backward, which are larger."""
    properties = SimpleNamespace(major=8, minor=6, name="NVIDIA X", shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    kernels = dataclasses.replace(backends_module._BACKENDS[1], devices=("cuda",), missing=None)
    assert kernels.name == "triton"

    def maps(channels):
        device = torch.device("cuda", 0)
        return SimpleNamespace(device=device, dtype=dtype, shape=(1, channels, 2, 2), is_floating_point=lambda: True)

    narrow, wide = maps(128), maps(129)
    assert kernels.refusal("pixel_propagate", narrow, narrow, narrow) is None
    reason = "on NVIDIA X it takes at most 128 channels of float32 or float16, not 129"
    expected = None if served or dtype == torch.bfloat16 else reason
    assert kernels.refusal("pixel_propagate", narrow, narrow, wide) == expected
    assert kernels.refusal("pseudo_label", wide) is None


def test_the_reference_is_what_it_says(monkeypatch):
    """backend="reference" and the environment variable reach the oracle."""
    called = []
    functions = set(ops.__all__) - {"correlation_rows"}
    for name in functions:
        original = getattr(corrmatch.reference, name)
        monkeypatch.setattr(
            corrmatch.reference, name, lambda *a, f=original, n=name, **k: called.append(n) or f(*a, **k)
        )
    monkeypatch.setenv("CORRMATCH_BACKEND", "reference")
    for op in ALL_OPS:
        for make in OPS[op].SAMPLES.values():
            call, arguments = make()
            call(*arguments)
    assert set(called) == functions
