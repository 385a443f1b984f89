"""Writes the measured tables of README.md from the newest evidence.

python benchmarks/readme_table.py            # after evidence was added to benchmarks/results
python benchmarks/readme_table.py --check    # exit code 1 if the README differs

Evidence is benchmarks/results/<device>/<date>/results.json, of `bench_corr --json` or of the GPU suite. The newest
run on a CPU and the newest on a GPU are shown, each between its markers in the README.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
EVIDENCE = ROOT / "benchmarks/results"
EAGER = "published eager"
INTEGER = ("region_propagate", "connected_components")  # ops without a floating dtype
END = "<!-- end of the measured table -->"

Record = dict[str, Any]


def newest(device_type: str, evidence: Path = EVIDENCE) -> tuple[Path, Record] | None:
    """File and record of the newest run on a CPU ("cpu") or GPU ("cuda"); None if there is none."""
    found = []
    for path in evidence.glob("*/*/results.json"):
        record = json.loads(path.read_text())
        if record.get("dry_run", False):
            raise ValueError(f"{path}: a dry run is no evidence")
        if record["environment"]["device_type"] == device_type:
            found.append((record["environment"]["date"], path, record))
    return max(found, key=lambda item: item[:2])[1:] if found else None


def section(device_type: str, evidence: Path = EVIDENCE) -> str:
    """The text between the markers of a device type in the README."""
    found = newest(device_type, evidence)
    if found is None:
        return "**Not yet measured on a GPU.**" if device_type == "cuda" else "**Not yet measured.**"
    path, record = found
    blocks = [caption(path, record, evidence), propagation(record), others(record), training(record)]
    images = sorted(path.parent.glob("*.png"))
    blocks += [f"![Time and memory of one image against the number of positions]({link(x, evidence)})"
               for x in images[:1]]  # fmt: skip
    return "\n\n".join(block for block in blocks if block)


def link(path: Path, evidence: Path) -> str:
    """The path of a file of the evidence, relative to the README."""
    return f"benchmarks/results/{path.relative_to(evidence).as_posix()}"


def caption(path: Path, record: Record, evidence: Path) -> str:
    """Device, software and date of a run."""
    found = record["environment"]
    machine = found["device"]
    if found["device_type"] == "cpu":
        threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
        machine += f", {threads}, {found['backends']['cpu'].split(' of ')[0]}"
    commit = f"commit {found['commit']}" if found["commit"] is not None else "of an unknown commit"
    line = f"{machine}, torch {found['torch']}; {commit}, {found['date'][:10]} ([evidence]({link(path, evidence)}))."
    return (
        f"{line} Times are of replays of a CUDA graph where there is one." if found["device_type"] == "cuda" else line
    )


def propagation(record: Record) -> str:
    """The table of pixel propagation: times, ratios, memory and, on a GPU, the share of the exp floor."""
    cases = [case for case in record["cases"] if case["op"] == "pixel_propagate"]
    if not cases:
        return ""
    floor = record["environment"]["device_type"] == "cuda"
    heads = ["`pixel_propagate`"]
    for name in ("forward", "forward + backward"):
        heads += [name, "against best peer", "eager", *(["of exp floor"] if floor else [])]
    rows = []
    for case in cases:
        ours = our_row(case)
        row = [f"{case['size'].replace('x', ' x ')}, {dtype(case)}"]
        for base in ("forward", "both"):
            name = timed_pass(ours, base)
            row += [
                duration(ours["times"][name]["median"]),
                f"**{best_ratio(case, name)}**",
                ratio_to(case, name, EAGER),
            ]
            row += [share(ours, name)] if floor else []
        rows.append([*row, peak(ours), peak(peers(case).get(EAGER))])
    return table([*heads, "peak extra memory", "eager"], rows)


def others(record: Record) -> str:
    """The table of the other ops, with a row for each. Sizes and kinds of input make a range."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for case in record["cases"]:
        if case["op"] != "pixel_propagate":
            grouped.setdefault((case["op"], dtype(case)), []).append(case)
    rows = []
    for (op, kind), cases in grouped.items():
        times, against = [], {}
        for case in cases:
            name = timed_pass(our_row(case), whole(case))
            times.append(our_row(case)["times"][name]["median"])
            for peer in peers(case):
                against.setdefault(peer, []).append(ratio(case, name, peer))
        sizes = " and ".join(dict.fromkeys(case["size"].replace("x", " x ") for case in cases))
        inputs = " and ".join(dict.fromkeys(re.split("[,;]", case["workload"])[0] for case in cases))
        faster_than = "; ".join(f"{span(values, faster)} {peer}" for peer, values in against.items())
        of_dtype = "" if op in INTEGER else f", {kind}"
        title = f"`{op}`, forward + backward" if whole(cases[0]) == "both" else f"`{op}`"
        rows.append([title, f"{sizes}{of_dtype}; {inputs}", span(times, duration), faster_than])
    return table(["", "inputs", "time", "faster than"], rows) if rows else ""


def whole(case: Record) -> str:
    """The pass that has everything: forward and backward if the op has one, else forward."""
    return "both" if "both" in our_row(case)["times"] else "forward"


def training(record: Record) -> str:
    """The table of the training step, if the record has one."""
    if record.get("train") is None:
        return ""
    rows = []
    for part, row in record["train"]["parts"].items():
        if EAGER in row:
            ours, theirs = row["corrmatch"]["median"], row[EAGER]["median"]
            rows.append([f"training: {part}", duration(ours), duration(theirs), faster(theirs / ours)])
    return table(["", "corrmatch", "eager", "faster"], rows)


def our_row(case: Record) -> Record:
    """The result of corrmatch."""
    row = next(row for row in case["contenders"] if row["ours"])
    if row["status"] != "ok":
        raise ValueError(f"{case['op']} {case['size']}: corrmatch was {row['status']}; that is no evidence")
    return row


def peers(case: Record) -> dict[str, Record]:
    """The timed peers by name. A family has its fastest member."""
    return {row["name"] if row["family"] is None else row["family"]: row
            for row in case["contenders"] if not row["ours"] and row["status"] == "ok"}  # fmt: skip


def timed_pass(row: Record, name: str) -> str:
    """The replay of a CUDA graph, if it was timed: it has no host time of launches."""
    return f"{name}_graph" if f"{name}_graph" in row["times"] else name


def ratio(case: Record, name: str, peer: str) -> float | None:
    """Speedup over a peer; None if it lacks the pass. A peer without a CUDA graph is timed without."""
    times = peers(case)[peer]["times"] if peer in peers(case) else {}
    theirs = times.get(name, times.get(name.removesuffix("_graph")))
    return None if theirs is None else theirs["median"] / our_row(case)["times"][name]["median"]


def ratio_to(case: Record, name: str, peer: str) -> str:
    """The same for people."""
    found = ratio(case, name, peer)
    return "—" if found is None else faster(found)


def best_ratio(case: Record, name: str) -> str:
    """Speedup over the fastest peer."""
    found = [x for x in (ratio(case, name, peer) for peer in peers(case)) if x is not None]
    return faster(min(found)) if found else "—"


def share(row: Record, name: str) -> str:
    """The share of the exp floor."""
    return f"{100 * row['floor_shares'][name]:.0f} %" if name in row["floor_shares"] else "—"


def peak(row: Record | None) -> str:
    """Peak memory of forward and backward together."""
    count = None if row is None else row["peak_extra_bytes"].get("both")
    return "—" if count is None else f"{count / 2**20:.{0 if count >= 100 * 2**20 else 1}f} MiB"


def dtype(case: Record) -> str:
    """The dtype of the inputs. Old evidence without it has the default of bench_corr."""
    return case.get("dtype", "float32")


def duration(seconds: float) -> str:
    """A time with its unit and three digits."""
    factor, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    value = factor * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def faster(times: float) -> str:
    """A ratio with two or three digits."""
    return f"{times:.0f}x" if times >= 20 else f"{times:.1f}x"


def span(values: list[float], shown: Callable[[float], str]) -> str:
    """A single value, or the smallest and the largest."""
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def updated(text: str, evidence: Path = EVIDENCE) -> str:
    """The text of the README with new tables."""
    for device_type in ("cpu", "cuda"):
        begin = f"<!-- measured table: {device_type} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(END)
        if not found or not closed:
            raise ValueError(f"the README lacks the markers {begin} and {END}")
        text = f"{head}{begin}\n{section(device_type, evidence)}\n{END}{tail}"
    return text


def main(arguments: list[str]) -> int:
    """Writes or checks the README; returns the exit code."""
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if arguments == ["--check"]:
        if new != text:
            print("README.md and benchmarks/results disagree: run python benchmarks/readme_table.py")
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
