"""Charts of the page that compares runs: ticks, letters."""

from __future__ import annotations

import numpy as np
import pytest

from corrmatch.training import charts

THREE = ("train.epochs=3", "train.eval_every=1")
CLASSES = ["sky", "a <b> & c"]


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.58, [0.3, 0.4, 0.5, 0.6]), (5, 5, [5, 6]),
    (-2, 3, [-2, -1, 0, 1, 2, 3]), (0, 0, [0, 0.2]), (1, 40000, [0, 10000, 20000, 30000, 40000]),
])  # fmt: skip
def test_ticks(low, high, expected):
    assert charts.ticks(low, high)[: len(expected)] == pytest.approx(expected)
    assert charts.ticks(low, high)[-1] >= high


def test_letters_do_not_cover_each_other():
    places = charts.spread([50, 52, 10, 51, 200], 0, 190)
    assert sorted(places) == [places[i] for i in (2, 0, 3, 1, 4)]
    assert min(np.diff(sorted(places))) >= charts.LETTER_GAP
    assert 0 <= min(places) <= max(places) <= 190
