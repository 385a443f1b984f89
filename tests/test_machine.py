"""The record of the machine in benchmarks."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from harness import machine

ANSWER = "1980, 1980, 2619, 2619, 412.53, 700.00, 44"


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """A replacement of nvidia-smi that prints an answer and keeps its arguments."""
    asked, script = tmp_path / "asked", tmp_path / "nvidia-smi"

    def answers(text, code=0):
        script.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "{text}"\nexit {code}\n')
        script.chmod(0o755)
        return asked

    properties = SimpleNamespace(uuid="1234-abcd", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return answers


def test_clocks_are_asked_for_and_never_set(nvidia_smi):
    asked = nvidia_smi(ANSWER)
    state = machine.clocks("cuda")
    assert state == {
        "sm_mhz": 1980, "sm_max_mhz": 1980, "memory_mhz": 2619, "memory_max_mhz": 2619,
        "power_w": 412.53, "power_limit_w": 700, "celsius": 44,
    }  # fmt: skip
    options = asked.read_text().split()
    assert options[0] == "--id=GPU-1234-abcd"
    assert options[1].startswith("--query-gpu=clocks.sm,")
    assert options[2:] == ["--format=csv,noheader,nounits"]
    assert machine.exponentials_a_second(state) == pytest.approx(16 * 132 * 1.98e9)


@pytest.mark.parametrize(("text", "code"), [("No devices were found", 6), (ANSWER, 9), ("", 0), ("1, 2", 0)])
def test_no_answer_is_null(nvidia_smi, text, code):
    nvidia_smi(text, code)
    state = machine.clocks("cuda")
    assert set(state) == set(machine.CLOCKS)
    assert set(state.values()) == {None}
    assert machine.exponentials_a_second(state) is None


def test_part_of_an_answer(nvidia_smi):
    nvidia_smi(ANSWER.replace("412.53", "[N/A]"))
    state = machine.clocks("cuda")
    assert state["power_w"] is None
    assert state["power_limit_w"] == 700


def test_a_cpu_has_none_of_it():
    found = machine.environment("cpu")
    assert [found[name] for name in ("gpu", "clocks", "cuda", "exponentials_a_second")] == [None] * 4
    assert found["torch"] == torch.__version__
    assert found["numpy"] is not None


def test_commit_of_copied_sources(monkeypatch):
    monkeypatch.setenv("CORRMATCH_COMMIT", "0123456789ab")
    assert machine.environment("cpu")["commit"] == "0123456789ab"
    assert machine.environment("cpu")["variables"]["CORRMATCH_COMMIT"] == "0123456789ab"
