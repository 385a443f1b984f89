"""Fixtures of all tests.

A test with the argument `backend` runs once for each backend of its op, which its module names in `OP` or the test in
its attribute `op`. With an argument `dtype` it runs for each floating dtype of each backend, and with `sample` for each
sample call and backend. Tests run with one thread, with random numbers from a seed of their own, and with poisoned
uninitialised memory.
"""

from __future__ import annotations

import os
import random
import zlib

import hypothesis
import numpy as np
import pytest
import torch
from backends import targets
from samples import SAMPLES

from corrmatch import _C

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it for deterministic algorithms
torch.backends.cudnn.allow_tf32 = False  # for the tolerances of float32
torch.set_num_threads(
    1
)  # test workers run side by side; set here because fixtures of modules run before those of tests

hypothesis.settings.register_profile(
    "corrmatch",
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("fast", hypothesis.settings.get_profile("corrmatch"), max_examples=15)


def pytest_addoption(parser):
    # Tolerances are statistical: with one seed in three, one test in thousands fails by a little. The seed is fixed by
    # default, so that a failure is caused by a change and not by chance.
    parser.addoption(
        "--seed", type=seed, default=2024, help="of the random numbers: a number (default: 2024) or random"
    )
    parser.addoption("--fast", action="store_true", help="without slow tests, on the reference and the default backend")


def seed(text):
    return random.SystemRandom().randrange(2**31) if text == "random" else int(text)


def pytest_configure(config):
    # Workers inherit it. Waiting threads do not spin, so other workers can use the processor.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    hypothesis.settings.load_profile("fast" if config.option.fast else "corrmatch")


def pytest_report_header(config):
    return f"--seed {config.option.seed}"


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if config.option.fast and item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return

    def asked(op):
        return [target for target in targets(op) if target.fast or not metafunc.config.option.fast]

    if "sample" in metafunc.fixturenames:
        pairs = [(target, sample) for sample in samples_of(metafunc) for target in asked(SAMPLES[sample][0])]
        ids = [f"{target}-{sample}" for target, sample in pairs]
        metafunc.parametrize("backend,sample", pairs, ids=ids, indirect=["backend"])
        return
    found = asked(getattr(metafunc.function, "op", metafunc.module.OP))
    if "dtype" in metafunc.fixturenames:
        both = [
            pytest.param(target, dtype, id=f"{target}-{str(dtype)[6:]}") for target in found for dtype in target.dtypes
        ]
        metafunc.parametrize("backend,dtype", both, indirect=["backend"])
    else:
        metafunc.parametrize("backend", found, ids=str, indirect=True)


def samples_of(metafunc):
    return getattr(metafunc.function, "samples", SAMPLES)


@pytest.fixture
def backend(request):
    """A backend, with its instruction set selected."""
    target = request.param
    before = _C.cpu.isa()
    if target.isa is not None:
        _C.cpu.select_isa(target.isa)
    yield target
    _C.cpu.select_isa(before)


@pytest.fixture(autouse=True)
def random_numbers(request):
    seed = request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the legacy state is what libraries use)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills torch.empty with NaN or the largest integer, so that elements which a kernel does not write are found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Restores one thread before each test, because tests of threads set other numbers."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_backend_chosen(monkeypatch):
    monkeypatch.delenv("CORRMATCH_BACKEND", raising=False)
    monkeypatch.delenv("CORRMATCH_CHECK", raising=False)


@pytest.fixture(scope="module")
def small_sample(tmp_path_factory):
    """The synthetic data set, with four steps an epoch."""
    from corrmatch.data.sample import draw_sample

    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder)
    for name, count in {"labeled": 5, "unlabeled": 8, "val": 3}.items():
        lines = (folder / "splits" / f"{name}.txt").read_text().splitlines()
        (folder / "splits" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines[:count]))
    return folder


@pytest.fixture
def fresh_process():
    """Resets accelerate, which keeps its settings for the life of a process. Memory is not filled, because this makes a
    network several times slower.
    """
    from accelerate.state import AcceleratorState

    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
