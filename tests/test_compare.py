"""The comparison of runs: rows, content of the page, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
import statistics

import browser
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from browser import Page
from PIL import Image
from training import die_in_step, scalars, shorten, small_config

from corrmatch import cli
from corrmatch.config import ConfigError, load_config, to_yaml
from corrmatch.data.sample import draw_sample
from corrmatch.training import charts, snapshot
from corrmatch.training.compare import read_rows
from corrmatch.training.page import page
from corrmatch.training.snapshot import Panel, Snapshot
from corrmatch.training.trainer import Trainer

pytestmark = pytest.mark.slow

THREE = ("train.epochs=3", "train.eval_every=1")
CLASSES = ["sky", "a <b> & c"]


@pytest.fixture(autouse=True)
def fresh_process():
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)


def written(folder, *overrides, miou=(0.25, 0.5, 0.375), labeled=23, kept=True):
    """A work directory with the files of a log, without training."""
    folder.mkdir(parents=True)
    config = load_config("sample", ["data.root=data", f"work_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": step, "kind": "train", "loss": 1 / step} for step in range(1, 31)]
    for step, value in zip(range(10, 31, 10), miou, strict=False):
        more = {f"iou_{name}": value + shift for name, shift in zip(CLASSES, (0.125, -0.125), strict=True)}
        lines.append({"step": step, "kind": "val", "miou": value, "accuracy": 0.75} | more)
    (folder / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kept:
        views = {"image": noise(), "truth": flat(2), "prediction": flat(3)}
        panels = [Panel("one", {name: snapshot.encode(view) for name, view in views.items()})]
        snapshot.write(folder, Snapshot(30, labeled, 100, CLASSES, [[30, 10], [0, 60]], panels))
    return folder


def noise():
    return np.random.default_rng(0).integers(0, 256, (33, 33, 3), np.uint8)


def flat(shade):
    return np.full((33, 33, 3), shade, np.uint8)


def read(rows, caption):
    """The first table of a page whose first column has this caption: row -> column -> text."""
    table = next(table for table in Page(page(rows)).tables if table[0][0] == caption)
    return {line[0]: dict(zip(table[0], line, strict=True)) for line in table[1:]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Real runs: two seeds of one method, one of another."""
    folder = tmp_path_factory.mktemp("trained")
    draw_sample(folder / "sample")
    shorten(folder / "sample", labeled=5, unlabeled=7, val=3)
    with (folder / "sample/splits/unlabeled.txt").open("a") as file:
        file.write("labeled_007\n")  # has a mask
    runs = {
        "s0": ("method=supervised",),
        "s1": ("method=supervised", "train.seed=1"),
        "c0": ("eval.pseudo_labels=true",),
    }
    for name, overrides in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(small_config(folder / "sample", folder / name, *THREE, *overrides)).run()
    return [folder / name for name in runs]


def test_numbers_of_the_page_are_those_of_the_logs(trained, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, trained), "--out", str(out)]) == 0
    assert "2 x supervised" in capsys.readouterr().out
    found = Page(out.read_text(encoding="utf-8"))
    s0, s1, c0 = (scalars(run, "val") for run in trained)
    assert [len(lines) for lines in (s0, s1, c0)] == [3, 3, 3]

    def expected(values):
        mean, *more = (
            f"{100 * statistics.fmean(values):.2f}",
            *(f"{100 * statistics.stdev(v):.2f}" for v in [values] if len(v) > 1),
        )
        return " ± ".join([mean, *more])

    table = next(t for t in found.tables if t[0][0] == "row")
    for line, runs in zip(table[1:], ((s0, s1), (c0,)), strict=True):
        cells = dict(zip(table[0], line, strict=True))
        assert cells["runs"] == str(len(runs))
        assert cells["last step"] == "12"
        assert cells["mean IoU, last"] == expected([run[-1]["miou"] for run in runs])
        assert cells["mean IoU, best"] == expected([max(line["miou"] for line in run) for run in runs])
        assert cells["accuracy, last"] == expected([run[-1]["accuracy"] for run in runs])
    for name in ("ball", "pond"):
        values = [[run[-1][f"iou_{name}"] for run in runs] for runs in ((s0, s1), (c0,))]
        assert found.charts[f"IoU of {name}"] == ["A", expected(values[0]), "B", expected(values[1])]
    runs = next(t for t in found.tables if t[0][0] == "run")
    assert [line[5].strip() for line in runs[1:]] == [f"{100 * run[-1]['miou']:.2f}" for run in (s0, s1, c0)]


def test_an_evaluation_leaves_its_confusion_matrix_and_panels(trained):
    for folder in trained:
        kept, line = snapshot.read(folder), scalars(folder, "val")[-1]
        counts = np.array(kept.confusion)
        assert kept.step == line["step"]
        assert (kept.labeled, kept.unlabeled) == (5, 8)
        assert counts.trace() / counts.sum() == pytest.approx(line["accuracy"])
        for i, name in enumerate(kept.classes):
            union = counts[i].sum() + counts[:, i].sum() - counts[i, i]
            assert (counts[i, i] / union if union else math.nan) == pytest.approx(line[f"iou_{name}"], nan_ok=True)
        (panel,) = kept.panels
        assert panel.name == "val_000"
        assert list(panel.views)[:2] == ["image", "prediction"]
        assert list(panel.views)[-1] == "truth"
    assert {"propagated", "regions"} <= panel.views.keys()
    assert not list(trained[0].glob("*.partial"))


def test_an_evaluation_replaces_the_one_before(tmp_path):
    run = written(tmp_path / "run")
    leftover = run / "evaluation.partial"
    leftover.mkdir()
    (leftover / "rest").touch()
    later = Snapshot(40, 23, 100, CLASSES, [[1, 2], [3, 4]], [])
    snapshot.write(run, later)
    assert snapshot.read(run) == later
    assert [path.name for path in (run / "evaluation").iterdir()] == ["evaluation.json"]
    assert not leftover.exists()


def test_resuming_drops_an_evaluation_of_later_steps(tmp_path, monkeypatch):
    draw_sample(tmp_path / "sample")
    shorten(tmp_path / "sample", labeled=5, unlabeled=8, val=3)
    config = small_config(tmp_path / "sample", tmp_path / "run", "method=supervised", *THREE)
    die_in_step(Trainer(config), 6, monkeypatch)
    kept = snapshot.read(tmp_path / "run")
    assert kept.step == 4
    Trainer(config, resume=True)
    assert snapshot.read(tmp_path / "run") == kept
    snapshot.write(tmp_path / "run", Snapshot(8, 5, 8, kept.classes, kept.confusion, []))  # of a run that was cut off
    Trainer(config, resume=True)
    assert snapshot.read(tmp_path / "run") is None


def test_label_maps_are_kept_exactly(tmp_path):
    labels = flat(7)
    labels[3:9, 4] = (1, 2, 3)
    run = written(tmp_path / "run")
    snapshot.write(
        run,
        Snapshot(
            1,
            1,
            1,
            CLASSES,
            [[1]],
            [Panel("x", {"image": snapshot.encode(noise()), "after it": snapshot.encode(labels)})],
        ),
    )
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == [
        "0_after_it.png",
        "0_image.jpeg",
        "evaluation.json",
    ]
    assert np.array_equal(np.asarray(Image.open(run / "evaluation/0_after_it.png").convert("RGB")), labels)


SAME_ROW = {
    "seed": ["train.seed=1"],
    "split": ["data.labeled=splits/other.txt", "data.unlabeled=splits/rest.txt"],
    "without effect": ["train.workers=3", "train.log_every=7"],
}
OTHER_ROW = {
    "rate": ["train.lr=0.5"],
    "data": ["data.root=elsewhere"],
    "option": ["propagation.regions=false"],
    "method": ["method=fixmatch"],
    "validation": ["data.val=splits/other.txt"],
}


@pytest.mark.parametrize("overrides", SAME_ROW.values(), ids=SAME_ROW)
def test_runs_of_one_setting_are_one_row(tmp_path, overrides):
    runs = [written(tmp_path / "a"), written(tmp_path / "b", *overrides, miou=(0.5, 0.5, 0.625))]
    (row,) = read_rows(runs)
    assert row.last("miou") == pytest.approx((0.5, statistics.stdev((0.375, 0.625))))
    assert read([row], "row")["Acorrmatch"]["mean IoU, best"] == f"56.25 ± {100 * statistics.stdev((0.5, 0.625)):.2f}"


@pytest.mark.parametrize("overrides", OTHER_ROW.values(), ids=OTHER_ROW)
def test_runs_of_other_settings_are_other_rows(tmp_path, overrides):
    rows = read_rows([written(tmp_path / "a"), written(tmp_path / "b", *overrides), written(tmp_path / "c")])
    assert [[run.folder.name for run in row.runs] for row in rows] == [["a", "c"], ["b"]]
    assert len({row.name for row in rows}) == 2
    key, _, value = overrides[0].partition("=")
    assert read(rows, "key")[key]["B"] == value
    assert read(rows, "row")[f"B{rows[1].name}"]["mean IoU, last"] == "37.50"


def test_more_labels_are_another_row(tmp_path):
    other = ["data.labeled=splits/other.txt"]
    runs = [written(tmp_path / "a"), written(tmp_path / "b", *other), written(tmp_path / "c", *other, labeled=46)]
    rows = read_rows(runs)
    assert [row.name for row in rows] == ["corrmatch, labelled=23", "corrmatch, labelled=46"]
    assert [len(row.runs) for row in rows] == [2, 1]


def test_lists_of_unknown_length_are_not_taken_for_splits(tmp_path):
    """Runs without the files of an evaluation have no number of labels."""
    runs = [written(tmp_path / "a", kept=False), written(tmp_path / "b", "data.labeled=x.txt", kept=False)]
    rows = read_rows(runs)
    assert len(rows) == 2
    assert "Confusion" not in page(rows)
    assert "<h2>Images" not in page(rows)


def test_runs_that_came_to_different_steps_are_told(tmp_path):
    rows = read_rows([written(tmp_path / "a"), written(tmp_path / "b", "train.seed=1", miou=(0.25, 0.5))])
    assert read(rows, "row")["Acorrmatch"]["last step"] == "20\u201330"
    assert "The runs of A have come to different steps." in page(rows)
    assert list(rows[0].over_steps("val", "miou")) == [10, 20]


def test_a_class_that_does_not_occur_is_not_counted(tmp_path):
    runs = [written(tmp_path / "a"), written(tmp_path / "b", "train.seed=1")]
    path = runs[1] / "scalars.jsonl"
    path.write_text(re.sub(r'"iou_sky": [\d.]+', '"iou_sky": NaN', path.read_text()))
    rows = read_rows(runs)
    assert rows[0].last("iou_sky") == pytest.approx((0.5, math.nan), nan_ok=True)
    assert read_rows(runs[1:])[0].last("iou_sky") == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert Page(page(read_rows(runs[1:]))).charts["IoU of sky"] == ["A", "n/a"]


def test_confusion_is_summed_and_shown_by_rows(tmp_path):
    rows = read_rows([written(tmp_path / "a"), written(tmp_path / "b", "train.seed=1")])
    assert rows[0].confusion.tolist() == [[60, 20], [0, 120]]
    texts = Page(page(rows)).charts["Confusion matrix of corrmatch"]
    assert [text for text in texts if text.isdigit()] == ["75", "25", "100"]
    assert "sky taken for a &lt;b&gt; &amp; c: 25.0 %" in page(rows)


def test_a_run_that_is_still_written_is_read(tmp_path):
    run = written(tmp_path / "a")
    with (run / "scalars.jsonl").open("a") as file:
        file.write('{"step": 31, "ki')
    assert read_rows([run])[0].runs[0].last["step"] == 30
    lines = (run / "scalars.jsonl").read_text().replace('{"step": 7', "{7")
    (run / "scalars.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=r"scalars\.jsonl: line 7 is not JSON"):
        read_rows([run])


def test_what_is_no_run_is_named(tmp_path, capsys):
    run, empty = written(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    cases = [
        ([empty], "empty: expected the work directory of a run, there is no config.yaml"),
        ([written(tmp_path / "young", miou=())], "young: no evaluation has been made in this run yet"),
        ([run, tmp_path / "empty/../run"], "run: given more than once"),
    ]
    for folders, message in cases:
        assert cli.main(["compare", *map(str, folders), "--out", str(tmp_path / "page.html")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()
    assert cli.main(["compare", str(run), "--out", str(tmp_path / "no/page.html")]) == 1


def test_the_page_stands_alone(tmp_path):
    text = page(read_rows([written(tmp_path / "a"), written(tmp_path / "b", "method=supervised")]))
    assert all(reference.startswith("data:image/") for reference in Page(text).references)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert "<b> &" not in text


@pytest.fixture(scope="module")
def chromium():
    found = browser.find_browser()
    if found is None:
        pytest.skip("no Chromium: neither Debian's package chromium nor a browser of playwright's is installed")
    return found


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(chromium, trained, tmp_path, width):
    out = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, trained), "--out", str(out)]) == 0
    found = browser.measure(chromium, tmp_path, out, width)
    assert found["width"] == width
    assert found["content"] <= width  # nothing to scroll sideways
    assert found["images"]
    assert "<h2>Pseudo-labels</h2>" in found["text"]
    assert found["texts"] > 100
    assert found["smallest"] >= 8.5  # pixels
    seen, written_down = Page(found["text"]), Page(out.read_text(encoding="utf-8"))
    assert seen.tables == written_down.tables
    assert seen.charts == written_down.charts


def test_on_paper(chromium, trained, tmp_path):
    out = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, trained), "--out", str(out)]) == 0
    browser.run(chromium, tmp_path, out, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_by_day_and_by_night(tmp_path):
    """The contrast of letters is at least 4.5 to 1, as accessibility guidelines require."""
    text = page(read_rows([written(tmp_path / "a")]))
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL)]
    assert len(themes) == 2
    for theme in themes:
        assert theme.keys() >= {"ink", "soft", *(f"k{i}" for i in range(charts.COLORS))}
        for name in ("ink", "soft", *(f"k{i}" for i in range(charts.COLORS))):
            low, high = sorted(luminance(theme[x]) for x in (name, "paper"))
            assert (high + 0.05) / (low + 0.05) >= 4.5, name
