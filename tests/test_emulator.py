"""The emulator that runs CUDA sources on the CPU: its primitives are right, and its launches are like those of CUDA."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from child import run_python
from emulator.planted import KERNELS, attempt, launch, module, seed

pytestmark = pytest.mark.slow

LANES = range(32)


@pytest.fixture(params=range(5), ids="seed{}".format)
def schedule(request):
    seed(request.param)


def integers(dtype, *shape):
    bounds = np.iinfo(dtype)
    return np.random.default_rng().integers(bounds.min, bounds.max, shape, dtype, endpoint=True)


# ---- Primitives: a kernel of primitives.cu each ----------------------------------------------------------------------


@pytest.mark.usefixtures("schedule")
class TestPrimitives:
    def test_indices(self):
        grid, block = (3, 4, 2), (5, 2, 3)
        found = launch("indices", np.zeros(1), np.full((24, 30, 6), -1, np.int32), grid=grid, block=block)
        for i, (z, y, x) in enumerate(np.ndindex(grid[::-1])):
            for j, (tz, ty, tx) in enumerate(np.ndindex(block[::-1])):
                assert found[i, j].tolist() == [x, y, z, tx, ty, tz]

    @pytest.mark.parametrize("n", [1, 2, 33, 255, 1024])
    def test_barrier(self, n):
        given = integers(np.int16, n).astype(np.int32)
        found = launch("reverse", given, np.zeros_like(given), block=(n,), shared=4 * n)
        assert (found == (given[::-1] if n % 2 else given) + n).all()

    def test_barrier_votes(self):
        given = np.zeros(96, np.int32)
        given[[3, 40, 95]] = 1, 4, 5
        assert (launch("barrier_votes", given, np.zeros((96, 4), np.int32), block=(96,)) == [1, 0, 1, 0]).all()

    @pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float32", "float64"])
    def test_shuffles(self, dtype):
        given = np.random.default_rng().random(64).astype(dtype) if "float" in dtype else integers(dtype, 64)
        found = launch(f"shuffles_{dtype}", given, np.zeros((64, 4), dtype), block=(64,))
        for i in range(64):
            lane, first = i % 32, i // 32 * 32
            sources = [(5 * i + 3) % 32, lane - 3, lane + 3, lane ^ 5]
            assert found[i].tolist() == [given[first + (s if s in LANES else lane)] for s in sources]

    @pytest.mark.parametrize("constant", [False, True])
    def test_votes(self, constant):
        given = np.full(32, 9, np.int32) if constant else integers(np.int32, 32)
        found = launch("votes", given, np.zeros((32, 4), np.uint32))

        def lanes(parity, test):
            return sum(1 << i for i in LANES if i % 2 == parity and test(given[i]))

        for i in LANES:
            odd, whole = i % 2, lanes(i % 2, lambda x: True)
            assert found[i].tolist() == [
                lanes(odd, lambda x, bit=2 - odd: x & bit),
                lanes(odd, lambda x: x & 4) > 0,
                lanes(odd, lambda x: x & 8) == whole,
                lanes(odd, lambda x, own=given[i]: x & 3 == own & 3),
            ]

    @pytest.mark.parametrize("dtype", ["int32", "uint32"])
    def test_sums(self, dtype):
        given = integers(dtype, 64)
        found = launch(f"sums_{dtype}", given, np.zeros(64, dtype), block=(64,))
        for group in (slice(0, 20), slice(20, 32), slice(32, 52), slice(52, 64)):
            assert (found[group] == given[group].sum(dtype=dtype)).all()

    def test_syncwarp(self):
        given = integers(np.int16, 96).astype(np.int32)
        found = launch("warp_sums", given, np.zeros_like(given), block=(96,), shared=4 * 96)
        assert (found.reshape(3, 32) == given.reshape(3, 32).sum(1)[:, None]).all()

    @pytest.mark.parametrize("dtype", ["int32", "uint32", "uint64"])
    def test_atomics(self, dtype):
        given, start = integers(dtype, 6 * 40), integers(dtype, 4)
        start[3] = 0
        found = launch(f"atomics_{dtype}", given, np.r_[start, 0 * given], grid=(6,), block=(40,))
        with np.errstate(over="ignore"):
            total = start[0] + given.sum(dtype=dtype)
        assert found[:4].tolist() == [total, min(start[1], given.min()), max(start[2], given.max()), len(given)]
        assert sorted(found[4:]) == list(range(len(given)))

    def test_waiting_in_a_loop(self):
        given = integers(np.int16, 48).astype(np.int32)
        found = launch("handed_over", given, np.zeros(49, np.int32), block=(48,))
        assert found.tolist() == [*given.cumsum(), 48]

    def test_bits(self):
        given = integers(np.uint32, 40, 2) >> integers(np.uint32, 40, 2) % np.uint32(32)
        given[0] = 0
        found = launch("bits", given, np.zeros((40, 5), np.uint32), block=(40,))
        for i, (x, y) in enumerate(given.tolist()):
            reverse = int(f"{x:032b}"[::-1], 2)
            assert found[i].tolist() == [x.bit_count(), (x & -x).bit_length(), 32 - x.bit_length(), reverse, x ^ y]

    def test_arithmetic(self):
        given = np.random.default_rng().integers(-(2**20), 2**20, (64, 2)).astype(np.float32) / 2**18
        given[given == 0] = 1
        x, y = given.T
        found = launch("arithmetic", given, np.zeros((64, 5), np.float32), block=(64,)).T
        assert (found[0] == x / y).all()
        np.testing.assert_allclose(found[1], np.exp2(x.astype(np.float64)), rtol=3e-7)
        flipped = (given.view(np.uint32) ^ 1).view(np.float32)[:, 1]
        assert (found[2:] == [np.minimum(x, y), np.maximum(x, y), flipped]).all()

    def test_conversions(self):
        found = launch("conversions", np.zeros(1), np.zeros((2, 2**16), np.float32), grid=(256,), block=(256,))
        bits = np.arange(2**16, dtype=np.uint16)
        np.testing.assert_array_equal(found[0], bits.view(np.float16).astype(np.float32))
        np.testing.assert_array_equal(found[1], (bits.astype(np.uint32) << 16).view(np.float32))

    @pytest.mark.parametrize(
        ("grid", "cluster"), [((6, 1), (1, 1)), ((6, 1), (2, 1)), ((4, 6), (2, 3)), ((16, 2), (8, 1))]
    )
    def test_clusters(self, grid, cluster):
        blocks, threads = grid[0] * grid[1], 40
        given = integers(np.int32, blocks, threads)
        taken = np.zeros((blocks, threads, 3), np.int32)
        numbers = {"grid": grid, "cluster": cluster, "block": (threads,), "shared": 4 * threads + 4}
        found = launch("clusters", given, taken, **numbers)
        count = cluster[0] * cluster[1]
        for y, x in np.ndindex(grid[::-1]):
            rank = x % cluster[0] + cluster[0] * (y % cluster[1])
            next_rank = (rank + 1) % count
            next_x = x // cluster[0] * cluster[0] + next_rank % cluster[0]
            next_y = y // cluster[1] * cluster[1] + next_rank // cluster[0]
            block = found[x + grid[0] * y]
            assert (block[:, 0] == given[next_x + grid[0] * next_y]).all()
            assert (block[:, 1] == rank).all()
            if rank == 0:
                assert (block[:, 2] == count * threads).all()


# ---- Schedules -------------------------------------------------------------------------------------------------------


def tickets(number):
    seed(number)
    return launch("atomics_int32", np.zeros(64, np.int32), np.zeros(68, np.int32), block=(64,))[4:].tolist()


def test_seed_decides_the_schedule():
    first = tickets(1)
    assert tickets(2) != first
    assert tickets(1) == first


def test_seed_from_the_environment(monkeypatch):
    code = """
    import numpy as np
    from emulator.planted import launch

    print(launch("atomics_int32", np.zeros(64, np.int32), np.zeros(68, np.int32), block=(64,))[4:].tolist())
    """
    monkeypatch.setenv("CORRMATCH_EMULATOR_SEED", "41")
    assert run_python(code).strip() == str(tickets(41))


# ---- Launches --------------------------------------------------------------------------------------------------------

LAUNCHES = {
    "no blocks": ("cudaErrorInvalidConfiguration", {"grid": (0,)}),
    "no threads": ("cudaErrorInvalidConfiguration", {"block": (0,)}),
    "1025 threads": ("cudaErrorInvalidConfiguration", {"block": (1025,)}),
    "2048 threads": ("cudaErrorInvalidConfiguration", {"block": (32, 64)}),
    "65 deep": ("cudaErrorInvalidConfiguration", {"block": (1, 1, 65)}),
    "65536 high": ("cudaErrorInvalidConfiguration", {"grid": (1, 65536)}),
    "more than 48 KiB": ("cudaErrorInvalidValue", {"shared": 48 * 1024 + 1}),
    "more than opted in": ("cudaErrorInvalidValue", {"shared": 100_001, "opt_in": 100_000}),
    "opted in to more than there is": ("cudaErrorInvalidValue", {"opt_in": 227 * 1024 + 1}),
    "grid no multiple of the cluster": ("cudaErrorInvalidClusterSize", {"grid": (6,), "cluster": (4,)}),
    "large cluster": ("cudaErrorInvalidClusterSize", {"grid": (16,), "cluster": (16,)}),
    "empty cluster": ("cudaErrorInvalidClusterSize", {"cluster": (0,)}),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_that_cuda_refuses(case):
    expected, numbers = LAUNCHES[case]
    taken = np.zeros(32, np.int32)
    assert attempt("race", np.ones(32, np.int32), taken, **numbers) == expected
    assert not taken.any(), "it ran"


def test_largest_launches():
    given = np.arange(1024, dtype=np.int32)
    found = launch("reverse", given, np.zeros_like(given), block=(1024,), shared=227 * 1024, opt_in=227 * 1024)
    assert (found == given + 1024).all()


@pytest.mark.parametrize(("arch", "kilobytes"), [("80", 163), ("86", 99), ("89", 99), ("90", 227)])
def test_architectures(monkeypatch, arch, kilobytes):
    monkeypatch.setenv("CORRMATCH_EMULATOR_ARCH", arch)
    most, number = 1024 * kilobytes, int(arch)
    assert module().attributes() == {
        "multiprocessors": 132,
        "major": number // 10,
        "minor": number % 10,
        "shared": most,
        "ptx": number,
        "binary": number,
    }
    given = np.arange(32, dtype=np.int32)
    assert (launch("reverse", given, 0 * given, shared=most, opt_in=most) == given + 32).all()
    assert attempt("reverse", given, 0 * given, opt_in=most + 1) == "cudaErrorInvalidValue"
    found = attempt("race", given, np.zeros(64, np.int32), grid=(2,), cluster=(2,), shared=128)
    assert found == ("cudaSuccess" if arch == "90" else "cudaErrorInvalidClusterSize")


def test_architecture_may_change_and_must_be_known(monkeypatch):
    zeros = np.zeros(32, np.int32)
    large = {"shared": 200 * 1024, "opt_in": 200 * 1024}
    assert attempt("race", zeros, zeros, **large) == "cudaSuccess"
    monkeypatch.setenv("CORRMATCH_EMULATOR_ARCH", "80")
    assert attempt("race", zeros, zeros, shared=200 * 1024) == "cudaErrorInvalidValue", "opted in elsewhere"
    monkeypatch.setenv("CORRMATCH_EMULATOR_ARCH", "9.0")
    with pytest.raises(ValueError, match="CORRMATCH_EMULATOR_ARCH is none of 80, 86, 89, 90"):
        module().attributes()


def test_errors_have_texts():
    assert module().error_string(9) == "invalid configuration argument"


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_are_real_cuda(source, tmp_path):
    flags = ["-std=c++20", "-arch=sm_90", "-Werror", "all-warnings", "-c", "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
