"""Some of the random calls of `fuzz.py`, and tests that it detects faults."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import random_calls
import torch
from child import FOLDER, run_python

from corrmatch import ops

pytestmark = pytest.mark.slow


def test_a_share(pytestconfig):
    """The command that repeats it is printed for each failure."""
    command = [sys.executable, "fuzz.py", "--cases", "100", "--seed", str(pytestconfig.option.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout


def test_cases_are_of_every_op_and_repeat_themselves():
    made = [random_calls.random_call(7, i) for i in range(200)]
    assert {drawn.name for drawn in made} == set(ops.__all__)
    for i in (0, 50, 199):
        again = random_calls.random_call(7, i)
        assert str(again) == str(made[i])
        for name, x in again.tensors.items():
            if isinstance(x, torch.Tensor):
                assert x.stride() == made[i].tensors[name].stride()
                assert torch.equal(x.nan_to_num(0.5), made[i].tensors[name].nan_to_num(0.5))


PLANTED = """
import os, sys, time
import agreement, fuzz, random_calls, torch
torch.set_num_threads(1)  # threads do not survive the fork
torch.cuda.is_available = lambda: False  # a process that is not forked would not have the fault
right, fault = agreement.call, sys.argv[1]
images = ((i, random_calls.random_call(5, i)) for i in range(200))
cases = [i for i, x in images if x.name == "connected_components" and x.tensors["image"].numel() > 1][:4]
planted = str(random_calls.random_call(5, cases[1]))

def call(drawn, target):
    if str(drawn) == planted:
        if fault == "wrong":
            return right(drawn, target).flatten().sort().values.view(drawn.tensors["image"].shape) + 1
        if fault == "raises":
            raise ZeroDivisionError("planted")
        if fault == "crash":
            os.abort()
        time.sleep(1000)
    return right(drawn, target)

agreement.call = call
print("planted in", cases[1])
print(fuzz.fuzz(5, cases, ["connected_components"], ["cpu-generic"], patience=10), "findings")
"""
WORDS = {
    "wrong": "numbers at",
    "raises": "ZeroDivisionError: planted",
    "crash": "the process ended: SIGABRT",
    "hang": "no end after 10 s",
}


@pytest.mark.parametrize("fault", WORDS)
def test_a_fault_is_found_and_can_be_repeated(fault):
    found = run_python(PLANTED, fault)
    assert WORDS[fault] in found
    planted = re.search(r"planted in (\d+)", found)[1]
    assert f"repeat: python tests/fuzz.py --seed 5 --only {planted} --backends cpu-generic" in found
    assert "4 calls, 1 findings" in found
