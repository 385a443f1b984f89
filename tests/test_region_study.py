"""The study of region propagation on a trained network."""

from __future__ import annotations

import json
import math

import pytest
import region_study
from training import scalars, shorten, small_config

from corrmatch.data.sample import draw_sample
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


def test_settings_are_combined():
    assert region_study.combinations([]) == [[]]
    assert region_study.combinations(["a=1,2", "b.c=x"]) == [["a=1", "b.c=x"], ["a=2", "b.c=x"]]


def test_it_finds_what_the_run_logged(tmp_path, monkeypatch, capsys):
    """It has the run's own `eval.pseudo_labels` for its settings. A threshold above all confidences gives no labels."""
    draw_sample(tmp_path / "sample")
    shorten(tmp_path / "sample", labeled=4, val=2)
    names = "\n".join(f"labeled_{i:03}" for i in range(4, 9))  # listed as unlabelled, although their masks exist
    (tmp_path / "sample" / "splits" / "unlabeled.txt").write_text(f"{names}\n")
    keys = ("method=fixmatch", "fixmatch.threshold=0.2", "propagation.head=true", "eval.pseudo_labels=true")
    Trainer(small_config(tmp_path / "sample", tmp_path / "run", *keys)).run()
    logged = scalars(tmp_path / "run", "pseudo")[-1]
    arguments = [str(tmp_path / "run" / "last.pt"), "fixmatch.threshold=0.2,1", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["region_study.py", *arguments])
    region_study.main()
    same, none = json.loads((tmp_path / "out.json").read_text())["results"]
    for name in region_study.COLUMNS:
        expected = math.nan if logged[name] is None else logged[name]  # the log writes NaN as null
        assert same[name] == pytest.approx(expected, nan_ok=True), name
    assert none["coverage"] == 0 < same["coverage"]
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[-2].split()[0]) == pytest.approx(100 * logged["coverage"], abs=0.05)
