"""The measured tables of the README equal those that the newest evidence gives."""

from __future__ import annotations

import json

import pytest
import readme_table

GRAPHS = {"forward": 2e-4, "both": 5e-4, "forward_graph": 1.234e-4, "both_graph": 4.5e-4}


def row(name, times, ours=False, peak=2**20, status="ok", family=None):
    found = {"name": name, "ours": ours, "family": family, "status": status, "error": 0.0}
    if status == "ok":
        found["times"] = {k: {"median": v, "spread": 0.01, "rounds": 9} for k, v in times.items()}
        found |= {"peak_extra_bytes": {"forward": 1, "both": peak}, "floor_shares": {"forward_graph": 0.47}}
    return found


def case(op, size, rows, workload="N = 81"):
    return {"op": op, "size": size, "workload": workload, "dtype": "bfloat16", "contenders": rows}


def record(date="2027-01-02T03:04:05+00:00", device_type="cuda", **rest):
    environment = {"date": date, "device": "NVIDIA X", "device_type": device_type, "torch": "2.11.0", "threads": 1,
                   "commit": "0123456789ab", "backends": {"cpu": "avx2 of generic, avx2"}}  # fmt: skip
    propagate = [
        row("corrmatch", GRAPHS, ours=True),
        row("row-chunked, 64 rows", {k: 3 * v for k, v in GRAPHS.items()}, family="row-chunked"),
        row("published eager", {k: 30 * v for k, v in GRAPHS.items()}, peak=300 * 2**20),
        row("published, compiled", {}, status="failed"),
    ]
    components = [
        case("connected_components", size, [row("corrmatch", {"forward": 9.0, "forward_graph": t}, ours=True),
             row("OpenCV", {"forward": u})], f"{kind}, 8-connectivity")
        for size, kind, t, u in (("9x9", "blobs", 1e-3, 2e-3), ("17x17", "noise", 2.5e-3, 0.1))
    ]  # fmt: skip
    found = {"environment": environment, "cases": [case("pixel_propagate", "9x9, B = 8", propagate), *components]}
    return found | {"dry_run": False, "train": None} | rest


@pytest.fixture
def evidence(tmp_path):
    def add(folder, found):
        path = tmp_path / folder / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        return tmp_path

    return add


def test_readme_says_what_the_evidence_says():
    text = readme_table.README.read_text(encoding="utf-8")
    assert text == readme_table.updated(text), "run python benchmarks/readme_table.py"


def test_readme_shows_the_newest_evidence():
    """The test reads the files itself and does not use the script."""
    text = readme_table.README.read_text(encoding="utf-8")
    found = [json.loads(path.read_text()) for path in readme_table.EVIDENCE.glob("*/*/results.json")]
    newest = max((x["environment"] for x in found if x["environment"]["device_type"] == "cpu"), key=lambda x: x["date"])
    assert f"commit {newest['commit']}, {newest['date'][:10]}" in text
    on_gpu = any(x["environment"]["device_type"] == "cuda" for x in found)
    assert ("Not yet measured on a GPU" in text) is not on_gpu


def test_tables_of_a_gpu(evidence):
    folder = evidence("gpu/2027-01-02", record())
    lines = readme_table.section("cuda", folder).splitlines()
    assert lines[0] == (
        "NVIDIA X, torch 2.11.0; commit 0123456789ab, 2027-01-02 "
        "([evidence](benchmarks/results/gpu/2027-01-02/results.json)). "
        "Times are of replays of a CUDA graph where there is one."
    )
    assert lines[4] == (
        "| 9 x 9, B = 8, bfloat16 | 123 µs | **3.0x** | 30x | 47 % | 450 µs | **3.0x** | 30x | — | 1.0 MiB | 300 MiB |"
    )
    assert lines[8] == (
        "| `connected_components` | 9 x 9 and 17 x 17; blobs and noise | 1.00 ms to 2.50 ms | 2.0x to 40x OpenCV |"
    )


def test_training_step(evidence):
    parts = {"step": {"corrmatch": {"median": 0.2}, "published eager": {"median": 0.5}}, "network": {"both": {}}}
    folder = evidence("gpu/2027-01-02", record(train={"parts": parts}))
    assert readme_table.section("cuda", folder).splitlines()[-1] == "| training: step | 200 ms | 500 ms | 2.5x |"


def test_newest_of_each_device(evidence):
    for folder, date, kind in (("a/2", "2027-02", "cuda"), ("a/1", "2027-03", "cuda"), ("b/9", "2028-01", "cpu")):
        root = evidence(folder, record(f"{date}-01T00:00:00+00:00", kind))
    assert readme_table.newest("cuda", root)[0] == root / "a/1/results.json"
    assert readme_table.newest("cpu", root)[0] == root / "b/9/results.json"
    assert readme_table.section("cpu", root).startswith("NVIDIA X, 1 thread, avx2, torch")


def test_without_evidence(tmp_path):
    assert readme_table.section("cuda", tmp_path) == "**Not yet measured on a GPU.**"


def test_a_dry_run_is_no_evidence(evidence):
    folder = evidence("gpu/2027-01-02", record(dry_run=True))
    with pytest.raises(ValueError, match="dry run is no evidence"):
        readme_table.section("cuda", folder)


def test_a_wrong_result_is_no_evidence(evidence):
    found = record()
    found["cases"][0]["contenders"][0] = row("corrmatch", {}, ours=True, status="wrong")
    with pytest.raises(ValueError, match="corrmatch was wrong; that is no evidence"):
        readme_table.section("cuda", evidence("gpu/2027-01-02", found))


def test_only_what_lies_between_the_markers_changes(evidence):
    folder = evidence("gpu/2027-01-02", record())
    markers = [f"<!-- measured table: {kind} -->\nold\n{readme_table.END}\n" for kind in ("cpu", "cuda")]
    new = readme_table.updated(f"head\n{markers[0]}middle\n{markers[1]}tail\n", folder)
    assert new.startswith(f"head\n<!-- measured table: cpu -->\n**Not yet measured.**\n{readme_table.END}\nmiddle\n")
    assert new.endswith(f"{readme_table.END}\ntail\n")
    assert "old" not in new
    assert new == readme_table.updated(new, folder)
    with pytest.raises(ValueError, match="lacks the markers"):
        readme_table.updated("no markers", folder)


def test_check_finds_a_readme_that_differs(monkeypatch, tmp_path, capsys):
    copy = tmp_path / "README.md"
    copy.write_text(readme_table.README.read_text(encoding="utf-8").replace(" ms | ", " s | ", 1), encoding="utf-8")
    monkeypatch.setattr(readme_table, "README", copy)
    assert readme_table.main(["--check"]) == 1
    assert "disagree" in capsys.readouterr().out
    assert readme_table.main([]) == 0
    assert readme_table.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.50 s"),
        (0.208, "208 ms"),
        (0.0113, "11.3 ms"),
        (1e-3, "1.00 ms"),
        (1.2e-5, "12.0 µs"),
        (3e-7, "0.30 µs"),
    ],
)
def test_durations(seconds, text):
    assert readme_table.duration(seconds) == text
