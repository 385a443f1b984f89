"""Timing in turns, memory, summaries and peers of the benchmark."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import bench_corr
import numpy as np
import pytest
import torch
from harness import measure, report
from harness.case import TOLERANCE, largest_relative_error
from ops import pixel_propagate
from ops.connected_components import raster_order

SCRIPT = Path(bench_corr.__file__)
TINY = ["--sizes", "5,7x6", "--batch", "1", "--budget", "1", "--device", "cpu"]
LIBRARIES = {"scipy": "scipy", "OpenCV": "cv2", "cc3d": "cc3d"}


def race(racing, seconds):
    """The number of rounds of each function."""
    outcomes = list(measure.race(racing, seconds, "cpu"))
    assert all(times["forward"] > 0 for _, times in outcomes)
    return [sum(i == j for j, _ in outcomes) for i in range(len(racing))]


def test_race_shares_time_and_keeps_minimum_rounds():
    calls = []

    def contender(name, seconds, ours=False):
        return measure.Contender(name, lambda: (calls.append(name), time.sleep(seconds)), ours=ours)

    racing = [contender("ours", 0.002, ours=True), contender("near", 0.004), contender("far", 0.05)]
    rounds = race(racing, 0.2)
    assert rounds == [calls.count(name) for name in ("ours", "near", "far")]
    assert rounds[0] > rounds[1] > rounds[2] >= measure.LEAST_ROUNDS_SLOW
    assert rounds[1] >= measure.LEAST_ROUNDS
    between = calls.index("far", calls.index("far") + 1) - calls.index("far")
    assert between > 5  # the fast ones run while the slow one waits for its turn


def test_race_without_time_still_has_minimum_rounds():
    racing = [measure.Contender(name, lambda: time.sleep(0.005)) for name in "ab"]
    assert race(racing, 0.0) == [measure.LEAST_ROUNDS] * 2


def test_peak_counts_what_a_call_takes_and_returns():
    size = 64 * 2**20
    peak = measure.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    assert peak is None or 0.99 * size < peak < 1.25 * size
    assert (peak is None) == (sys.platform != "linux")


def test_summary_of_known_samples():
    summary = measure.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert summary["median"] == 3.0
    assert summary["spread"] == pytest.approx(1 / 3)


def test_ratio_of_known_times():
    def row(name, seconds, ours=False):
        return {"name": name, "ours": ours, "times": {"forward": {"median": seconds}}}

    rows = [row("corrmatch", 2.0, ours=True), row("near", 3.0), row("far", 40.0)]
    assert [report.ratio(r, rows, "forward").strip() for r in rows] == ["1.50x", "1.50", "20.0"]


def attention(query, key, value, scale):
    scores = scale * (query.float() @ key.float().mT)
    return (scores.softmax(-1) @ value.float()).to(value.dtype), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_composition_of_attentions_has_the_gradients_of_the_published_form(dtype):
    """The attention has a differentiable lse, as FlexAttention has on a GPU."""
    maps = [torch.randn(2, c, 5, 7, dtype=dtype).requires_grad_() for c in (21, 21, 6)]
    wide = [x.detach().double().requires_grad_() for x in maps]
    upstream = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    out = pixel_propagate.attention_composition(attention, power_of_two=True)(*maps)
    expected = pixel_propagate.published(*wide)
    found = (out.detach(), *torch.autograd.grad(out, maps, upstream.to(dtype)))
    wanted = (expected.detach(), *torch.autograd.grad(expected, wide, upstream))
    assert largest_relative_error(found, wanted) < TOLERANCE[dtype] + 1e-5


def test_components_are_renumbered_in_raster_order():
    labels = np.array([[0, 7, 7], [3, 0, 0], [3, 0, 5]])
    assert raster_order(labels).tolist() == [[0, 1, 1], [2, 0, 0], [2, 0, 3]]
    assert raster_order(np.array([[4, 2]])).tolist() == [[1, 2]]
