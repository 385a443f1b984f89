"""The benchmark: its output, its JSON, and that wrong contenders are not timed."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_corr
import numpy as np
import pytest
import torch
from gpu_suite import heed_interrupts
from harness import measure, report
from ops import OPS, connected_components, pixel_propagate

import corrmatch

pytestmark = pytest.mark.slow

SCRIPT = Path(bench_corr.__file__)
TINY = ["--sizes", "5,7x6", "--batch", "1", "--budget", "1", "--device", "cpu"]
LIBRARIES = {"scipy": "scipy", "OpenCV": "cv2", "cc3d": "cc3d"}


def test_script_prints_tables_and_writes_figures(tmp_path):
    figures, image = tmp_path / "figures.json", tmp_path / "figure.png"
    command = [sys.executable, str(SCRIPT), *TINY, "--threads", "1", "--json", str(figures), "--plot", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(figures.read_text())

    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert {line.split(":")[0] for line in lines} >= set(OPS)
    assert "All agree with the oracle." in done.stdout
    assert image.read_bytes().startswith(b"\x89PNG")

    assert record["failures"] == 0
    assert not record["interrupted"]
    assert record["command"] == command[2:]
    assert record["environment"]["threads"] == 1
    assert {"device", "torch", "python", "corrmatch", "commit", "date", "backends"} <= set(record["environment"])
    measured = [case["op"] for case in record["cases"]]
    assert {op: measured.count(op) for op in OPS} == dict.fromkeys(OPS, 2) | {"connected_components": 4}
    assert sum(line.startswith("▸ corrmatch") for line in lines) == len(measured)
    for case in record["cases"]:
        assert case["elements"] > 0
        check_contenders(case, done.stdout)


def check_contenders(case, printed):
    assert case["contenders"][0]["ours"]
    for row in case["contenders"]:
        if row["name"] in LIBRARIES and importlib.util.find_spec(LIBRARIES[row["name"]]) is None:
            assert row["status"] == "not installed"
            continue
        assert row["status"] in ("ok", "slower variant")
        assert row["error"] <= case["tolerance"]
        if row["status"] == "slower variant":
            continue
        assert row["name"] in printed
        passes = {"forward", "backward", "both"} if case["op"].startswith("pixel_") else {"forward"}
        assert set(row["times"]) == ({"forward"} if row["name"] == "attention composition" else passes)
        assert set(row["peak_extra_bytes"]) == set(row["times"]) - {"backward"}
        for times in row["times"].values():
            assert times["rounds"] == len(times["seconds"]) >= 2
            assert 0 < min(times["seconds"]) <= times["median"] <= max(times["seconds"])
            assert times["spread"] >= 0


def run(tmp_path, *arguments):
    figures = tmp_path / "figures.json"
    code = bench_corr.main([*TINY, "--budget", "0.2", "--json", str(figures), *arguments])
    return code, json.loads(figures.read_text())


def doubled_gradient(query, key, value):
    out = pixel_propagate.row_chunked(64)(query, key, value)
    return out + (out - out.detach())


WRONG = {
    "zeros": lambda query, key, value: 0 * value + 0 * query.sum() + 0 * key.sum(),
    "NaN": lambda query, key, value: np.nan * value * query.sum() * key.sum(),
    "wrong gradient only": doubled_gradient,
}


@pytest.mark.parametrize("garbage", WRONG.values(), ids=WRONG)
def test_wrong_peer_is_reported_and_not_timed(monkeypatch, tmp_path, capsys, garbage):
    monkeypatch.setattr(pixel_propagate, "published", garbage)
    code, record = run(tmp_path, "--ops", "pixel_propagate")
    assert code == 1
    assert record["failures"] == len(record["cases"]) == 2
    for case in record["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        assert rows["published eager"]["status"] == "wrong"
        assert "times" not in rows["published eager"]
        assert rows["corrmatch"]["status"] == "ok"
    printed = capsys.readouterr().out
    assert printed.count("WRONG, not timed") == 2
    assert "2 FAILED" in printed


class CompilationError(Exception):
    """An error that is not a RuntimeError, like those of Triton."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, CompilationError])
def test_peer_that_raises_is_reported_and_the_others_timed(monkeypatch, tmp_path, capsys, error):
    def refuses(query, key, value):
        raise error("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(pixel_propagate, "published", refuses)
    code, record = run(tmp_path, "--ops", "pixel_propagate")
    assert code == 1
    assert record["failures"] == len(record["cases"]) == 2
    for case in record["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        failed = rows.pop("published eager")
        assert (failed["status"], failed["reason"]) == ("failed", f"{error.__name__}: CUDA out of memory.")
        assert "times" not in failed
        assert {row["status"] for row in rows.values()} == {"ok", "slower variant"}
    assert capsys.readouterr().out.count(f"FAILED, not timed: {error.__name__}: CUDA out of memory.") == 2


def test_peer_that_raises_while_it_is_timed_is_reported_and_the_others_timed(monkeypatch, tmp_path):
    calls = []

    def tires(query, key, value):
        calls.append(query)
        if len(calls) > 12:
            raise CompilationError("no more")
        return 1 * row_chunked(query, key, value)

    row_chunked = pixel_propagate.row_chunked(64)
    monkeypatch.setattr(pixel_propagate, "published", tires)
    code, record = run(tmp_path, "--ops", "pixel_propagate", "--sizes", "5")
    assert code == 1
    rows = {row["name"]: row for row in record["cases"][0]["contenders"]}
    failed = rows.pop("published eager")
    assert (failed["status"], failed["reason"]) == ("failed", "CompilationError: no more")
    assert {row["status"] for row in rows.values()} == {"ok", "slower variant"}


def test_case_that_cannot_be_made_stops_no_other(monkeypatch, tmp_path, capsys):
    def refuses(*arguments):
        raise CompilationError("no masks")

    monkeypatch.setattr(corrmatch.ops, "region_masks", refuses)
    code, record = run(tmp_path, "--ops", "region_propagate,pseudo_label", "--sizes", "5")
    assert code == 1
    assert record["failures"] == 1
    assert [case["op"] for case in record["cases"]] == ["pseudo_label"]
    assert "nothing measured: CompilationError: no masks" in capsys.readouterr().out


def test_what_compiles_comes_last_and_is_compared_with_corrmatch(monkeypatch, tmp_path, capsys):
    order = []

    def noted(name, f):
        return lambda *maps: (order.append((name, maps[0].shape[2])), f(*maps))[1]

    monkeypatch.setattr(torch, "compile", lambda f, **_: noted("compiled", f))
    monkeypatch.setattr(corrmatch.ops, "pixel_propagate", noted("ours", corrmatch.ops.pixel_propagate))
    code, record = run(tmp_path, "--ops", "pixel_propagate", "--sizes", "5,7", "--compile")
    assert code == 0
    first = order.index(("compiled", 5))
    assert {size for _, size in order[:first]} == {5, 7}
    assert set(order[first:]) == {(name, size) for name in ("compiled", "ours") for size in (5, 7)}
    assert [case["contenders"][-1]["name"] for case in record["cases"]] == ["published, compiled"] * 2
    assert capsys.readouterr().out.count("published, compiled") == 2


@pytest.mark.parametrize("timed", ["pseudo_label", "pixel_propagate"])
def test_interrupted_run_leaves_what_was_timed(tmp_path, timed):
    """SIGINT during another op, or the same. The file is complete at any moment."""
    figures = tmp_path / "figures.json"
    ops = dict.fromkeys([timed, "pixel_propagate"])
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--batch", "1", "--sizes", "61", "--ops", ",".join(ops)]
    command += ["--budget", "3" if len(ops) > 1 else "600", "--json", str(figures)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = json.loads(figures.read_text())["cases"] if figures.exists() else []
        ours = [row for case in found if case["op"] == timed for row in case["contenders"][:1]]
        if ours and ours[0]["status"] == "ok" and "times" in ours[0]:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == bench_corr.INTERRUPTED, printed
    assert "Interrupted: what was not timed is missing." in printed
    record = json.loads(figures.read_text())
    assert record["interrupted"]
    assert {"load_after", "clocks_after"} <= set(record["environment"])
    rows = [row for case in record["cases"] if case["op"] == timed for row in case["contenders"]]
    assert rows[0]["times"]["forward"]["rounds"] >= 1
    assert {row["status"] for case in record["cases"] for row in case["contenders"]} <= {
        "ok", "untimed", "slower variant"
    }  # fmt: skip


def test_wrong_corrmatch_is_reported_and_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(corrmatch.ops, "connected_components", lambda image: torch.zeros_like(image, dtype=torch.int32))
    code, record = run(tmp_path, "--ops", "connected_components")
    assert code == 1
    assert [row["status"] for case in record["cases"] for row in case["contenders"] if row["ours"]] == ["wrong"] * 4
    assert "! corrmatch" in capsys.readouterr().out


def test_missing_libraries_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(connected_components, "component_peers", lambda connectivity: {})
    code, record = run(tmp_path, "--ops", "connected_components")
    assert code == 0
    for case in record["cases"]:
        assert [row["status"] for row in case["contenders"]] == ["ok", *["not installed"] * len(LIBRARIES)]
    assert capsys.readouterr().out.count("not installed") == len(LIBRARIES) * len(record["cases"])


def test_oracle_that_does_not_fit_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    code, record = run(tmp_path, "--ops", "pixel_propagate")
    assert code == 1
    assert record["cases"] == []
    assert "nothing measured" in capsys.readouterr().out


def test_channels_and_patches(tmp_path):
    """A grid of a transformer: 14 pixels a position, so the ratio of the sizes is not whole."""
    shape = ("--sizes", "5x4", "--channels", "3,150", "--patch", "14")
    code, record = run(tmp_path, "--ops", "pixel_propagate,region_masks,pixel_loss,connected_components", *shape)
    assert code == 0
    found = [(case["op"], "= 150" in case["workload"]) for case in record["cases"]]
    wide_too = ("pixel_propagate", "region_masks", "pixel_loss")
    assert found == [(op, wide) for op in wide_too for wide in (False, True)] + [("connected_components", False)] * 2
    assert "5x4 to 70x56" in record["cases"][2]["size"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_agree(tmp_path, dtype):
    ops = "pixel_propagate,region_masks,pseudo_label"
    code, record = run(tmp_path, "--dtype", dtype, "--ops", ops, "--value-grad")
    assert code == 0
    assert {case["dtype"] for case in record["cases"]} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "41x"], "expected sizes"),
        (["--sizes", "1"], "expected sizes"),
        (["--batch", "0"], "whole number from 1"),
        (["--ops", "sort"], "no op 'sort'"),
        (["--channels", "21,"], "whole number from 1"),
        (["--plot", "figure.png", "--channels", "150"], "drawn for 21 channels"),
    ],
)
def test_bad_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench_corr.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_plot_without_its_op_is_refused_first():
    with pytest.raises(SystemExit, match="pixel_propagate"):
        bench_corr.main(["--plot", "figure.png", "--ops", "pseudo_label"])


def test_a_graph_has_a_row_and_the_floor_a_line():
    times = {name: {"median": 2e-3, "spread": 0.0} for name in ("forward", "backward", "both")}
    graphs = {name: {"median": 1e-3, "spread": 0.0} for name in ("forward_graph", "both_graph")}
    row = {"name": "corrmatch", "ours": True, "status": "ok", "error": 0.0, "times": times | graphs}
    peer = {**row, "name": "peer", "ours": False, "times": times | {"forward_graph": {"median": 3e-3, "spread": 0.0}}}
    for r in (row, peer):
        r["peak_extra_bytes"] = {"forward": 0, "both": 0}
    result = {"op": "pixel_propagate", "size": "9x9", "workload": "", "elements": 1, "unit": ""}
    result |= {"contenders": [row, peer], "exponentials": {"forward": 10**6, "both": 2 * 10**6}}
    report.add_floor_shares(result, 2e9)
    assert peer["floor_shares"] == {"forward": 0.25, "forward_graph": pytest.approx(1 / 6), "both": 0.5}
    lines = report.block(result).splitlines()
    assert [line[:20].strip() for line in lines[1:5]] == ["▸ corrmatch", "in a CUDA graph", "peer", "in a CUDA graph"]
    assert "3.00x" in lines[2]
    assert lines[5].strip() == (
        "share of the exp floor: forward 25 %, forward in a graph 50 %, forward + backward 50 %, "
        "forward + backward in a graph 100 %"
    )
