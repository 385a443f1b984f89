"""The record of training runs: its content, and the share of the headroom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from smaller_images import is_mask, shrink
from test_compare import written
from training_record import gain, main, record, rows


@pytest.fixture
def runs(tmp_path):
    """Scores of runs: labels alone 30 and 32 per cent, all labels 50, a method 36 and 40."""
    made = []
    for name, labeled, seed, miou in (
        ("low0", 23, 0, 0.30), ("low1", 23, 1, 0.32), ("high0", 367, 0, 0.50),
        ("method0", 23, 0, 0.39), ("method1", 23, 1, 0.42),
    ):  # fmt: skip
        method = "fixmatch" if name.startswith("method") else "supervised"
        overrides = (f"method={method}", f"train.seed={seed}")
        made.append(written(tmp_path / name, *overrides, labeled=labeled, miou=(0.2, 0.45, miou)))
    return made


def test_the_share_of_the_headroom(runs):
    table = rows([record(folder) for folder in runs])
    assert [len(members) for _, members in table] == [2, 1, 2]
    assert [gain(row, table) for row in table] == [None, None, pytest.approx((40.5 - 31) / (50 - 31))]
    alone = rows([record(folder) for folder in runs[:2] + runs[3:]])
    assert gain(alone[-1], alone) is None  # nothing to measure it by


def test_the_file_holds_each_run_once_and_prints_its_table(runs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "deep" / "record.json"
    for given in (runs, runs[:1], []):
        monkeypatch.setattr("sys.argv", ["training_record.py", str(file), *map(str, given)])
        main()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + 3
        assert lines[-1].endswith("| 23 | 30 | 2 | 40.5 ± 2.1 | 45.0 ± 0.0 | 0.50 |")
    content = json.loads(file.read_text())
    assert sorted(run["name"] for run in content["runs"]) == ["high0", "low0", "low1", "method0", "method1"]
    kept = next(run for run in content["runs"] if run["name"] == "method1")
    assert kept["miou"] == {"10": 20.0, "20": 45.0, "30": 42.0}
    assert kept["labelled"] == 23
    assert "train.seed" not in kept["keys"]
    assert {"commit", "device", "torch"} <= kept["environment"].keys()


def test_steps_of_the_run_before_count(runs, tmp_path):
    folder = written(tmp_path / "after", "method=fixmatch", f"model.init={runs[0] / 'last.pt'}", labeled=23)
    kept = record(folder)
    assert kept["steps"] == 60
    assert kept["keys"]["model.init"] == "low0"  # no place on this machine
    assert list(kept["miou"]) == [10, 20, 30]


def test_smaller_images(tmp_path):
    source, target = tmp_path / "data", tmp_path / "small"
    for folder, value in (("train", 100), ("trainannot", 3)):
        (source / folder).mkdir(parents=True)
        image = Image.new("L", (8, 6), value)
        image.putpixel((0, 0), value + 4)
        image.save(source / folder / f"a.{'png' if 'annot' in folder else 'jpg'}", quality=100)
    (source / "train.txt").write_text("train/a.jpg trainannot/a.png\n")
    shrink(source, target, (4, 3))
    name, mask = (target / "train.txt").read_text().split()
    with Image.open(target / name) as image, Image.open(target / mask) as labels:
        assert image.size == labels.size == (4, 3)
        assert image.getpixel((0, 0)) in (101, 102)  # the mean of four pixels, of which one is brighter by 4
        assert set(labels.tobytes()) <= {3, 7}  # no label is made up


def test_masks_of_cityscapes_are_in_folders_of_cities():
    assert is_mask(Path("gtFine/train/aachen/a.png"))
    assert not is_mask(Path("leftImg8bit/train/aachen/a.png"))
