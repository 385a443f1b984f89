"""The figure of `bench_corr`: time and peak memory of pixel propagation against N."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from harness import report

COLORS = {
    "corrmatch": "#c1121f",
    "row-chunked": "#1d6fa5",
    "attention composition": "#6a994e",
    "FlexAttention composition": "#6a994e",
    "published eager": "#444444",
    "published, compiled": "#8d5fb8",
}
APART = 0.05  # least distance of two labels, as a share of the axis


def require(ops: list[str]) -> None:
    """Ends the program with a message if there is nothing to draw, or matplotlib is missing."""
    if "pixel_propagate" not in ops:
        raise SystemExit("--plot draws pixel_propagate, which --ops leaves out")
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install '.[bench]'")


def draw(results: list[dict[str, Any]], environment: dict[str, Any], path: Path) -> None:
    """Writes the figure. Both panels show figures per image, because batch sizes differ between sizes."""
    from matplotlib.figure import Figure

    results = sorted((r for r in results if r["op"] == "pixel_propagate"), key=lambda r: r["positions"])
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    panel(time, curves(results, lambda row, name: 1e3 * row["times"][name]["median"]), results)
    panel(memory, curves(results, _peak), results)
    time.set_title("Time of one image, ms", loc="left", fontweight="bold")
    memory.set_title("Peak extra memory of one image, MiB", loc="left", fontweight="bold")
    commit = "" if environment["commit"] is None else f" ({environment['commit']})"
    figure.suptitle(
        f"pixel_propagate, D = C = 21, {results[0]['dtype']}: solid forward + backward, dashed forward alone",
        fontsize=12,
    )
    figure.supxlabel(
        f"{environment['device']}, {report.threads(environment)}; corrmatch {environment['corrmatch']}{commit}, "
        f"torch {environment['torch']}, {environment['date'][:10]}",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=140)


def _peak(row: dict[str, Any], name: str) -> float | None:
    count = row["peak_extra_bytes"].get(name)
    return None if count is None else max(count, 4096) / 2**20


def curves(results: list[dict[str, Any]], figure_of: Any) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Points (N, figure of an image) by contender and pass."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for result in results:
        for row in result["contenders"]:
            for name in ("forward", "both"):
                if row["status"] != "ok" or name not in row["times"]:
                    continue
                y = figure_of(row, name)
                if y is not None:
                    label = row["name"] if row["family"] is None else row["family"]
                    found.setdefault((label, name), []).append((result["positions"], y / result["batch"]))
    return found


def panel(axes: Any, found: dict[tuple[str, str], list[tuple[int, float]]], results: list[dict[str, Any]]) -> None:
    """Draws curves with their names at their ends."""
    sizes = {result["positions"]: result["size"] for result in results}
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(list(sizes), [f"{n}\n{size}" for n, size in sizes.items()])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel("positions N")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    ends: dict[str, tuple[int, float]] = {}
    for (label, name), points in found.items():
        ours, both = label == "corrmatch", name == "both"
        axes.plot(
            *zip(*points, strict=True),
            color=COLORS.get(label, "#000000"),
            linestyle="-" if both else "--",
            linewidth=2.6 if ours else 1.6,
            marker="o",
            markersize=5,
            markerfacecolor=COLORS.get(label, "#000000") if both else "white",
            zorder=3 if ours else 2,
        )
        if both or label not in ends:
            ends[label] = points[-1]
    bottom, top = axes.get_ylim()
    apart, height = (top / bottom) ** APART, 0.0
    for label, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        height = max(y, apart * height)
        axes.annotate(
            label, (x, height), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9,
            color=COLORS.get(label, "#000000"), fontweight="bold" if label == "corrmatch" else "normal",
            annotation_clip=False,
        )  # fmt: skip
