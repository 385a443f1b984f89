"""The emulator that runs CUDA sources on the CPU detects all planted faults."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from child import FOLDER
from emulator import build
from emulator.planted import launch, seed

pytestmark = pytest.mark.slow


@pytest.fixture(params=range(5), ids="seed{}".format)
def schedule(request):
    seed(request.param)


# ---- Faults: a kernel of faults.cu each ------------------------------------------------------------------------------


def differing(name, given, right, **numbers):
    """The number of seeds, of ten, for which the result of the kernel is wrong."""
    wrong = 0
    for number in range(10):
        seed(number)
        wrong += not np.array_equal(launch(name, given, np.zeros_like(right), **numbers), right)
    return wrong


def test_races_show():
    given = np.random.default_rng().permutation(64).astype(np.int32)
    one = given[:32]
    assert differing("race", given, np.roll(given, -1), block=(64,), shared=256)
    assert differing("race_of_rounds", given, np.roll(given, -3), block=(64,), shared=256)
    assert differing("race_of_a_warp", one, np.full_like(one, one.sum()), shared=128)
    assert differing("race_of_blocks", given, np.ones(2, np.int32), grid=(16,))


def test_uninitialised_shared_memory_is_rubbish():
    found = []
    for number in range(10):
        seed(number)
        found.append(launch("unwritten", np.zeros(1), np.zeros(32, np.float32), shared=128))
    assert np.isnan([first for first, *_ in found]).any()
    assert len({float(first).hex() for first, *_ in found}) > 2
    assert not np.any([rest for _, *rest in found])


ERRORS = {
    "barrier_after_return": [r"no thread can go on", r"1 finished .*\(7,0,0\)", r"31 waiting for __syncthreads at "],
    "barrier_in_both_branches": [r"no thread can go on", r"7 waiting for __syncthreads", r"25 waiting for "],
    "barrier_in_a_loop": [r"no thread can go on", r"7 finished", r"25 waiting for __syncthreads"],
    "barrier_of_some_blocks": [r"32 finished .*block \(0,0,0\)", r"32 waiting for cluster_group::sync"],
    "vote_in_a_branch": [r"7 waiting for __ballot_sync with mask 0xffffffff", r"25 waiting for __syncthreads"],
    "vote_after_return": [r"1 finished .*thread \(7,0,0\)", r"31 waiting for __ballot_sync with mask 0xffffffff"],
    "vote_with_two_masks": [r"7 waiting for __ballot_sync with mask 0x7f", r"25 waiting for .* with mask 0xff"],
    "vote_without_the_caller": [r"thread \(31,0,0\): the mask of a warp-wide call does not name its caller"],
    "vote_of_two_kinds": [r"7 waiting for __any_sync with mask 0xff", r"25 waiting for __all_sync with mask 0xff"],
    "shuffle_from_another_mask": [r"a shuffle reads from a lane that its mask does not name"],
    "neighbour_has_ended": [r"block \(0,0,0\), .* the block of that rank has ended"],
    "rank_beyond_the_cluster": [r"the cluster has no block of that rank, at "],
}


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_place_and_cause(name):
    blocks = (2,) if any(word in name for word in ("blocks", "rank", "neighbour")) else (1,)
    with pytest.raises(RuntimeError) as error:
        launch(name, np.zeros(32, np.int32), np.zeros(32, np.int32), grid=blocks, cluster=blocks, shared=128)
    message = str(error.value)
    assert message.startswith("emulated kernel")
    assert f"in void planted::{name}(Buffers)" in message
    assert "faults.cu:" in message
    for pattern in ERRORS[name]:
        assert re.search(pattern, message), message
    given = np.arange(33, dtype=np.int32)
    found = launch("reverse", given, np.zeros_like(given), block=(33,), shared=132)
    assert (found == given[::-1] + 33).all(), "the launch after an error went wrong"


def test_waiting_in_a_loop_ends():
    with pytest.raises(
        RuntimeError, match=r"livelock: .*\n  32 running, last seen at faults.cu:\d+ in void planted::waits"
    ):
        launch("waits_for_ever", np.zeros(1), np.zeros(1, np.int32))


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
    from emulator.planted import launch

    blocks = (2,) if "neighbour" in "{name}" else (1,)
    launch("{name}", np.zeros(4096, np.int32), np.zeros(4096, np.int32), grid=blocks, cluster=blocks, shared=128)
    """
    done = sanitized("-c", textwrap.dedent(code))
    assert done.returncode != 0, done.stdout
    assert SANITIZED[name] in done.stderr, done.stderr
    assert f"planted::{name}" in done.stderr
    assert "faults.cu:" in done.stderr
    if "AddressSanitizer" in SANITIZED[name]:
        place = r"in emulated block \(\d,0,0\), thread \(\d+,0,0\)"
        assert re.search(place, done.stderr), done.stderr


def test_sanitizers_find_nothing_else():
    files = "test_emulator.py", "test_emulator_faults.py"
    done = sanitized("-m", "pytest", "-q", "-n0", *files, "-k", "seed0 and (TestPrimitives or errors_name)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout
