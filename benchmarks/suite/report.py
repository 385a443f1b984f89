"""The report of the GPU suite: report.md, plots, and the table on the terminal."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from harness import plot, report

DRY = "**Dry run: nothing in this report was measured on a GPU.** It shows only that every step works."


def write(results: dict[str, Any], out: Path) -> None:
    """Writes report.md and, if matplotlib is installed, a figure for each dtype of pixel_propagate."""
    plots = draw(results, out) if importlib.util.find_spec("matplotlib") is not None else []
    blocks = [heading(results), steps(results), *figures(results), *training(results), *plots]
    (out / "report.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def draw(results: dict[str, Any], out: Path) -> list[str]:
    """The figures in the report."""
    shown = []
    cases = [case for case in results["cases"] if case["op"] == "pixel_propagate"]
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        name = f"pixel_propagate-{dtype}.png"
        plot.draw([case for case in cases if case["dtype"] == dtype], results["environment"], out / name)
        shown.append(f"![pixel_propagate, {dtype}]({name})")
    return shown


def heading(results: dict[str, Any]) -> str:
    """The environment. The report of a dry run begins with a line that says so."""
    found = results["environment"]
    lines = [DRY, ""] if results["dry_run"] else []
    if found is None:
        return "\n".join([*lines, "# GPU suite", "", "No device: see the steps."])
    lines += [f"# GPU suite: {found['device']}", ""]
    facts = {
        "commit": found["commit"] if found["commit"] is not None else "unknown",
        "date": found["date"],
        "versions": ", ".join(f"{name} {found[name]}" for name in ("corrmatch", "torch", "triton", "cuda", "numpy",
                                                                  "python") if found[name] is not None),
        "backends": "; ".join(f"{name}: {detail}" if detail else name for name, detail in found["backends"].items()),
        "platform": f"{found['platform']}, {report.threads(found)}",
    }  # fmt: skip
    if found["gpu"] is not None:
        gpu = found["gpu"]
        facts["GPU"] = (
            f"driver {gpu['driver']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} "
            f"multiprocessors, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        )
        facts["clocks at the start"] = ", ".join(f"{k} {v:g}" for k, v in found["clocks"].items() if v is not None)
    if found["variables"]:
        facts["variables"] = ", ".join(f"{k}={v}" for k, v in found["variables"].items())
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in facts.items() if text)])


def steps(results: dict[str, Any]) -> str:
    """The table of steps and their results."""
    lines = ["## Steps", "", "| step | | seconds | limit | SM clock, MHz | |", "|---|---|---|---|---|---|"]
    for step in results["steps"]:
        clocks = [f"{x['sm_mhz']:g}" for x in step["clocks"] or () if x is not None and x["sm_mhz"] is not None]
        cells = [step["name"], step["status"], f"{step['seconds']:.0f}", f"{step['limit']:.0f}", " to ".join(clocks),
                 remark(step)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    failed = [name for step in results["steps"] if step["tests"] is not None for name in step["tests"]["names"]]
    return "\n".join([*lines, *([""] if failed else []), *(f"- failed: `{name}`" for name in failed)])


def figures(results: dict[str, Any]) -> list[str]:
    """The tables of `bench_corr`."""
    found = []
    for op, dtype in dict.fromkeys((case["op"], case["dtype"]) for case in results["cases"]):
        cases = [case for case in results["cases"] if (case["op"], case["dtype"]) == (op, dtype)]
        rows = [row for case in cases for row in case["contenders"] if row["status"] == "ok"]
        heads = report.op_header(op, cases[0]["title"], report.passes_of(*rows))
        lines = [heads, *(report.block(case) for case in cases)]
        found.append("\n".join([f"## {op}, {dtype}", "", "```", "\n".join(lines).rstrip(), "```"]))
    return found


def training(results: dict[str, Any]) -> list[str]:
    """The table of `bench_train`."""
    if results["train"] is None:
        return []
    setting, parts = results["train"]["setting"], results["train"]["parts"]
    lines = ["## Training step", "", f"{setting['backbone']}, {setting['batch']} + {setting['batch']} images of "
             f"{setting['crop']} x {setting['crop']}, float32; +: with this on top of what lines before it add.", "",
             "| part | contender | ms | spread | peak extra MiB |", "|---|---|---|---|---|"]  # fmt: skip
    for part, rows in parts.items():
        for name, row in rows.items():
            peak = "n/a" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.0f}"
            lines.append(f"| {part} | {name} | {1e3 * row['median']:.1f} | {100 * row['spread']:.0f} % | {peak} |")
    return ["\n".join(lines)]


def line(step: dict[str, Any]) -> str:
    """A step in the table on the terminal."""
    return f"{step['name']:<20}{step['status']:<11}{step['seconds']:>5.0f} s of {step['limit']:>3.0f}  {remark(step)}"


def remark(step: dict[str, Any]) -> str:
    """The counts of tests, and the reason of a failure."""
    tests = step["tests"]
    counts = [] if tests is None else [f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped")]
    return ", ".join([*([step["reason"]] if step["reason"] is not None else []), *counts])


def table(results: dict[str, Any]) -> str:
    """All steps, and the verdict."""
    count, seconds = results["failures"], results["seconds"]
    verdict = f"all passed, {seconds:.0f} s" if count == 0 else f"{count} FAILED, {seconds:.0f} s; see the logs"
    lines = [f"{'step':<20}{'status':<11}{'time':>12}", *map(line, results["steps"]), verdict]
    return "\n".join([*lines, *(["dry run: nothing was measured on a GPU"] if results["dry_run"] else [])])
