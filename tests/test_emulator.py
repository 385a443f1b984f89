"""The emulator that runs CUDA sources on the CPU: its primitives give right answers, and it shows planted faults."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from child import FOLDER, run_python
from emulator import build, planted

SEEDS = range(5)
LANES = range(32)


@pytest.fixture(scope="module", name="planted")
def planted_kernels():
    return planted.load()


def size(numbers):
    return {key: (*value, 1, 1)[:3] if isinstance(value, tuple) else value for key, value in numbers.items()}


@pytest.fixture
def launch(planted):
    """Launches a kernel by name; what it made of a copy of `taken`."""

    def run(name, given, taken, **numbers):
        taken = np.array(taken)
        assert planted.launch(name, given, taken, **size(numbers)) == "cudaSuccess"
        return taken

    return run


@pytest.fixture(params=SEEDS, ids="seed{}".format)
def seed(planted, request):
    build.seed(planted, request.param)


def integers(dtype, *shape):
    bounds = np.iinfo(dtype)
    return np.random.default_rng().integers(bounds.min, bounds.max, shape, dtype, endpoint=True)


# ---- Primitives: a kernel of primitives.cu each ----------------------------------------------------------------------


@pytest.mark.usefixtures("seed")
class TestPrimitives:
    def test_indices(self, launch):
        grid, block = (3, 4, 2), (5, 2, 3)
        found = launch("indices", np.zeros(1), np.full((24, 30, 8), -1, np.int32), grid=grid, block=block)
        for i, (z, y, x) in enumerate(np.ndindex(grid[::-1])):
            for j, (tz, ty, tx) in enumerate(np.ndindex(block[::-1])):
                assert found[i, j].tolist() == [x, y, z, tx, ty, tz, 2, j]

    @pytest.mark.parametrize("n", [1, 2, 33, 255, 1024])
    def test_barrier(self, launch, n):
        given = integers(np.int16, n).astype(np.int32)
        found = launch("reverse", given, np.zeros_like(given), block=(n,), shared=4 * n)
        assert (found == (given[::-1] if n % 2 else given) + n).all()

    @pytest.mark.parametrize("bits", [0, 5, 7])
    def test_barrier_votes(self, launch, bits):
        given = integers(np.int32, 96) & 1 | bits
        found = launch("barrier_votes", given, np.zeros((96, 4), np.int32), block=(96,))
        assert (found == [(given & 1).sum(), bits & 2 > 0, bits & 4 > 0, 0]).all()

    @pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float32", "float64"])
    def test_shuffles(self, launch, dtype):
        given = np.random.default_rng().random(64).astype(dtype) if "float" in dtype else integers(dtype, 64)
        found = launch(f"shuffles_{dtype}", given, np.zeros((64, 5, 4), dtype), block=(64,))
        for i, by_width in enumerate(found):
            for width, row in zip((2, 4, 8, 16, 32), by_width, strict=True):
                first = i // width * width
                sources = [first + (5 * i + 3) % width, i - 3, i + 3, i ^ 5]
                inside = [True, sources[1] >= first, sources[2] < first + width, sources[3] < first + width]
                assert row.tolist() == [given[s if ok else i] for s, ok in zip(sources, inside, strict=True)]

    @pytest.mark.parametrize("constant", [False, True])
    def test_votes(self, launch, constant):
        given = np.full(32, 9, np.int32) if constant else integers(np.int32, 32)
        found = launch("votes", given, np.zeros((32, 8), np.uint32))

        def lanes(parity, test):
            return sum(1 << i for i in LANES if i % 2 == parity and test(given[i]))

        for i in LANES:
            odd, whole = i % 2, lanes(i % 2, lambda x: True)
            assert found[i].tolist() == [
                lanes(odd, lambda x, bit=2 - odd: x & bit),
                lanes(odd, lambda x: x & 4) > 0,
                lanes(odd, lambda x: x & 8) == whole,
                lanes(odd, lambda x, own=given[i]: x & 3 == own & 3),
                0xFFFFFFFF * constant,
                constant,
                0xFFFFFFFF,
                3,
            ]

    @pytest.mark.parametrize("dtype", ["int32", "uint32"])
    def test_folds(self, launch, dtype):
        given = integers(dtype, 64)
        found = launch(f"folds_{dtype}", given, np.zeros((64, 6), dtype), block=(64,))
        functions = np.add, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor
        for group in (slice(0, 20), slice(20, 32), slice(32, 52), slice(52, 64)):
            assert (found[group] == [f.reduce(given[group], dtype=dtype) for f in functions]).all()

    def test_syncwarp(self, launch):
        given = integers(np.int16, 96).astype(np.int32)
        found = launch("warp_sums", given, np.zeros_like(given), block=(96,), shared=4 * 96)
        assert (found.reshape(3, 32) == given.reshape(3, 32).sum(1)[:, None]).all()

    @pytest.mark.parametrize("dtype", ["int32", "uint32"])
    def test_atomics(self, launch, dtype):
        given, start = integers(dtype, 6 * 40), integers(dtype, 9)
        start[8] = 0
        found = launch(f"atomics_{dtype}", given, np.r_[start, 0 * given], grid=(6,), block=(40,))
        total = given.sum(dtype=dtype)
        with np.errstate(over="ignore"):
            assert found[:9].tolist() == [
                start[0] + total,
                start[1] - total,
                min(start[2], given.min()),
                max(start[3], given.max()),
                start[4] & np.bitwise_and.reduce(given),
                start[5] | np.bitwise_or.reduce(given),
                start[6] ^ np.bitwise_xor.reduce(given),
                start[7] + total,
                len(given),
            ]
        assert sorted(found[9:]) == list(range(len(given)))

    def test_wide_atomics(self, launch):
        given, start = integers(np.uint64, 6 * 40), integers(np.uint64, 8)
        found = launch("wide_atomics", given, np.r_[start, 0 * given], grid=(6,), block=(40,))
        total = given.sum(dtype=np.uint64)
        with np.errstate(over="ignore"):
            assert found[1:8].tolist() == [
                start[1] + total,
                min(start[2], given.min()),
                max(start[3], given.max()),
                start[4] & np.bitwise_and.reduce(given),
                start[5] | np.bitwise_or.reduce(given),
                start[6] ^ np.bitwise_xor.reduce(given),
                start[7] + total,
            ]
        assert sorted([found[0], *found[8:]]) == sorted([start[0], *given]), "an exchanged value was lost"

    def test_float_atomic(self, launch):
        given = integers(np.int8, 96).astype(np.float32) / 8
        assert launch("float_sum", given, np.zeros(1, np.float32), grid=(3,)) == given.sum()

    def test_spin_lock(self, launch):
        assert launch("spin_lock", np.zeros(1), np.zeros(2, np.int32), grid=(5,), block=(48,)).tolist() == [0, 240]

    def test_last_block(self, launch):
        given = integers(np.int16, 7 * 64).astype(np.int32)
        found = launch("last_block", given, np.zeros(2 + given.size, np.int32), grid=(7,), block=(64,))
        assert found.tolist() == [7, given.sum(), *given]

    def test_bits(self, launch):
        given = integers(np.uint32, 40, 2) >> integers(np.uint32, 40, 2) % np.uint32(32)
        given[:3] = (0, 0), (0, 1 << 31), (1, 0)
        found = launch("bits", given, np.zeros((40, 11), np.uint32), block=(40,))
        for i, (x, y) in enumerate(given.tolist()):
            wide, selector, n = y << 32 | x, 0x7C0A ^ i, i % 32
            picked = [wide >> 8 * (selector >> 4 * k & 7) & 255 for k in range(4)]
            signed = [selector >> 4 * k & 8 for k in range(4)]
            permuted = [(255 if byte > 127 else 0) if s else byte for byte, s in zip(picked, signed, strict=True)]
            assert found[i].tolist() == [
                x.bit_count(),
                wide.bit_count(),
                (x & -x).bit_length(),
                (wide & -wide).bit_length(),
                32 - x.bit_length(),
                64 - wide.bit_length(),
                int(f"{x:032b}"[::-1], 2),
                (wide << n) >> 32 & 0xFFFFFFFF,
                wide >> n & 0xFFFFFFFF,
                int.from_bytes(permuted, "little"),
                x ^ y,
            ]

    def test_arithmetic(self, launch):
        given = np.random.default_rng().integers(-(2**20), 2**20, (64, 2)).astype(np.float32) / 2**18
        given[given == 0] = 1
        found = launch("arithmetic", given, np.zeros((64, 14), np.float32), block=(64,))
        x, y = given.T
        exact = given.astype(np.float64)
        fused = (exact[:, 0] * exact[:, 1] + 1).astype(np.float32)
        assert (fused != x * y + np.float32(1)).any(), "a sum of rounded products would pass"
        assert (found[:, :5] == np.stack([x + y, x * y, x / y, fused, x / y], 1)).all()
        powers = np.exp2(exact[:, 0]), np.exp2(exact[:, 0]), np.exp(exact[:, 0]), 1 / abs(exact[:, 1])
        np.testing.assert_allclose(found[:, 5:9], np.stack(powers, 1), rtol=3e-7)
        flipped = (given.view(np.uint32) ^ 1).view(np.float32).T
        last = np.minimum(x, y), np.maximum(x, y), *flipped, np.minimum(x, 0.25) + np.maximum(y, 0.5)
        assert (found[:, 9:] == np.stack(last, 1)).all()

    def test_conversions(self, launch):
        halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
        given = integers(np.uint32, 2**16).view(np.float32)
        with np.errstate(invalid="ignore"):
            given[::3] = (halves[::3] + np.roll(halves, -1)[::3]) / 2  # half way between two halves
        given[1::3] = (given[1::3].view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)  # between two bfloat16
        found = launch("conversions", given, np.zeros((4, 2**16), np.float32), grid=(256,), block=(256,))
        with np.errstate(over="ignore"):
            rounded = given.astype(np.float16).astype(np.float32)
        bfloats = np.arange(2**16, dtype=np.uint32) << 16
        np.testing.assert_array_equal(found[0], halves)
        np.testing.assert_array_equal(found[1], bfloats.view(np.float32))
        np.testing.assert_array_equal(found[2], rounded)
        np.testing.assert_array_equal(found[3], torch.from_numpy(given).bfloat16().float().numpy())

    def test_vectors(self, launch):
        given = integers(np.uint16, 32, 4).astype(np.int32)
        found = launch("vectors", given, np.zeros((32, 4), np.float32))
        assert (found == given[:, ::-1]).all()

    @pytest.mark.parametrize(
        ("grid", "cluster"), [((6, 1), (1, 1)), ((6, 1), (2, 1)), ((4, 6), (2, 3)), ((16, 2), (16, 1))]
    )
    def test_clusters(self, launch, grid, cluster):
        blocks, threads = grid[0] * grid[1], 40
        given = integers(np.int32, blocks, threads)
        taken = np.zeros((blocks, threads, 4), np.int32)
        numbers = {"grid": grid, "cluster": cluster, "block": (threads,), "shared": 4 * threads + 4}
        found = launch("clusters", given, taken, large_cluster=True, **numbers)
        count = cluster[0] * cluster[1]
        for y, x in np.ndindex(grid[::-1]):
            rank = x % cluster[0] + cluster[0] * (y % cluster[1])
            next_rank = (rank + 1) % count
            next_x = x // cluster[0] * cluster[0] + next_rank % cluster[0]
            next_y = y // cluster[1] * cluster[1] + next_rank // cluster[0]
            block = found[x + grid[0] * y]
            assert (block[:, 0] == given[next_x + grid[0] * next_y]).all()
            assert (block[:, 1] == rank).all()
            assert (block[:, 2] == rank * threads + np.arange(threads)).all()
            if rank == 0:
                assert (block[:, 3] == count * threads).all()


# ---- Schedules -------------------------------------------------------------------------------------------------------


def tickets(launch, planted, number):
    build.seed(planted, number)
    return launch("atomics_int32", np.zeros(64, np.int32), np.zeros(73, np.int32), block=(64,))[9:].tolist()


def test_seed_decides_the_schedule(launch, planted):
    first = tickets(launch, planted, 1)
    assert tickets(launch, planted, 2) != first
    assert tickets(launch, planted, 1) == first


def test_seed_from_the_environment(launch, planted, monkeypatch):
    code = """
    import numpy as np
    from emulator import planted

    planted = planted.load()
    taken = np.zeros(73, np.int32)
    planted.launch("atomics_int32", np.zeros(64, np.int32), taken, block=(64, 1, 1))
    print(taken[9:].tolist())
    """
    monkeypatch.setenv("CORRMATCH_EMULATOR_SEED", "41")
    assert run_python(code).strip() == str(tickets(launch, planted, 41))


# ---- Faults: a kernel of faults.cu each ------------------------------------------------------------------------------


def differing(launch, planted, name, given, right, **numbers):
    """On how many of ten seeds the kernel's result is not the right one."""
    wrong = 0
    for number in range(10):
        build.seed(planted, number)
        wrong += not np.array_equal(launch(name, given, np.zeros_like(right), **numbers), right)
    return wrong


def test_races_show(launch, planted):
    given = np.random.default_rng().permutation(64).astype(np.int32)
    one = given[:32]
    assert differing(launch, planted, "race", given, np.roll(given, -1), block=(64,), shared=256)
    assert differing(launch, planted, "race_of_rounds", given, np.roll(given, -3), block=(64,), shared=256)
    assert differing(launch, planted, "race_of_a_warp", one, np.full_like(one, one.sum()), shared=128)
    assert differing(launch, planted, "race_of_blocks", given, np.ones(2, np.int32), grid=(16,))


def test_uninitialised_shared_memory_is_rubbish(launch, planted):
    found = []
    for number in range(10):
        build.seed(planted, number)
        found.append(launch("unwritten", np.zeros(1), np.zeros(32, np.float32), shared=128))
    assert np.isnan([first for first, *_ in found]).any()
    assert len({float(first).hex() for first, *_ in found}) > 2
    assert not np.any([rest for _, *rest in found])


ERRORS = {
    "barrier_after_return": [r"no thread can go on", r"1 finished .*\(7,0,0\)", r"31 waiting for __syncthreads at "],
    "barrier_in_both_branches": [r"barriers at different places", r"7 waiting for __syncthreads", r"25 waiting for "],
    "barrier_in_a_loop": [r"no thread can go on", r"7 finished", r"25 waiting for __syncthreads"],
    "barrier_of_some_blocks": [r"32 finished .*block \(0,0,0\)", r"32 waiting for cluster_group::sync"],
    "vote_in_a_branch": [r"7 waiting for __ballot_sync with mask 0xffffffff", r"25 waiting for __syncthreads"],
    "vote_after_return": [r"1 finished .*thread \(7,0,0\)", r"31 waiting for __ballot_sync with mask 0xffffffff"],
    "vote_with_two_masks": [r"7 waiting for __ballot_sync with mask 0x7f", r"25 waiting for .* with mask 0xff"],
    "vote_without_the_caller": [r"thread \(31,0,0\): the mask of a warp-wide call does not name its caller"],
    "vote_of_two_kinds": [r"7 waiting for __any_sync with mask 0xff", r"25 waiting for __all_sync with mask 0xff"],
    "shuffle_from_another_mask": [r"a shuffle reads from a lane that its mask does not name"],
    "shuffle_of_an_odd_width": [r"the width of a shuffle is no power of two"],
    "trap": [r"thread \(7,0,0\): __trap, at "],
    "neighbour_has_ended": [r"block \(0,0,0\), .* the block of that rank has ended"],
    "rank_beyond_the_cluster": [r"the cluster has no block of that rank, at "],
}


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_place_and_cause(launch, planted, name):
    blocks = (2,) if any(word in name for word in ("blocks", "rank", "neighbour")) else (1,)
    with pytest.raises(RuntimeError) as error:
        launch(name, np.zeros(32, np.int32), np.zeros(32, np.int32), grid=blocks, cluster=blocks, shared=128)
    message = str(error.value)
    assert message.startswith(f"emulated kernel planted::{name}(Buffers), block (")
    assert f"in void planted::{name}(Buffers)" in message
    assert "faults.cu:" in message
    for pattern in ERRORS[name]:
        assert re.search(pattern, message), message
    given = np.arange(33, dtype=np.int32)
    found = launch("reverse", given, np.zeros_like(given), block=(33,), shared=132)
    assert (found == given[::-1] + 33).all(), "the launch after an error went wrong"


def test_waiting_in_a_loop_ends(launch):
    with pytest.raises(
        RuntimeError, match=r"livelock: .*\n  32 running, last seen at faults.cu:\d+ in void planted::waits"
    ):
        launch("waits_for_ever", np.zeros(1), np.zeros(1, np.int32))


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
    "larger cluster": ("cudaErrorInvalidClusterSize", {"grid": (32,), "cluster": (32,), "large_cluster": True}),
    "empty cluster": ("cudaErrorInvalidClusterSize", {"cluster": (0,)}),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_that_cuda_refuses(planted, case):
    expected, numbers = LAUNCHES[case]
    taken = np.zeros(32, np.int32)
    assert planted.launch("race", np.ones(32, np.int32), taken, **size(numbers)) == expected
    assert not taken.any(), "it ran"


def test_largest_launches(launch):
    given = np.arange(1024, dtype=np.int32)
    found = launch("reverse", given, np.zeros_like(given), block=(1024,), shared=227 * 1024, opt_in=227 * 1024)
    assert (found == given + 1024).all()


def test_device(planted):
    assert planted.attributes() == {"multiprocessors": 132, "major": 9, "shared": 227 * 1024}
    assert planted.error_string(9) == "invalid configuration argument"
    assert planted.occupancy(1024, 0) == 2
    assert planted.occupancy(128, 100 * 1024) == 2
    assert planted.occupancy(32, 0) == 32


# ---- Sanitizers ------------------------------------------------------------------------------------------------------

SANITIZED = {
    "shared_write_past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "global_write_past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "global_read_before_the_start": "AddressSanitizer: heap-buffer-overflow",
    "local_write_past_the_end": "out of bounds for type",
    "neighbour_ends_meanwhile": "AddressSanitizer: heap-use-after-free",
    "unaligned": "misaligned address",
}


def sanitized(*command):
    environment = build.sanitized_environment()
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=FOLDER, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_find(name):
    """Each of these memory errors ends the process with a report that names kernel and source line."""
    code = f"""
    import numpy as np
    from emulator import planted

    planted = planted.load()
    given, taken = np.zeros(4096, np.int32), np.zeros(4096, np.int32)
    size = {{"grid": (2, 1, 1), "cluster": (2, 1, 1)}} if "neighbour" in "{name}" else {{}}
    planted.launch("{name}", given, taken, shared=128, **size)
    """
    done = sanitized("-c", textwrap.dedent(code))
    assert done.returncode != 0, done.stdout
    assert SANITIZED[name] in done.stderr, done.stderr
    assert f"planted::{name}" in done.stderr
    assert "faults.cu:" in done.stderr
    if "AddressSanitizer" in SANITIZED[name]:
        place = rf"in emulated kernel planted::{name}\(Buffers\), block \(\d,0,0\), thread \(\d+,0,0\)"
        assert re.search(place, done.stderr), done.stderr


def test_sanitizers_find_nothing_in_the_primitives():
    done = sanitized("-m", "pytest", "-q", "-n0", "test_emulator.py", "-k", "seed0 and (TestPrimitives or errors_name)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", planted.KERNELS, ids=lambda path: path.name)
def test_kernels_are_real_cuda(source, tmp_path):
    flags = ["-std=c++20", "-arch=sm_90", "-Werror", "all-warnings", "-c", "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
