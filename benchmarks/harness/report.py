"""The tables of `bench_corr`. A result is one of the "cases" of its JSON. Like the GPU suite it does not need torch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 116
NAME = 25
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
LEGEND = {
    "ms": "median of the rounds ± half the interquartile range; contenders take turns.",
    "ratio": "for corrmatch (▸): so many times faster than the fastest peer. For a peer: its time as a multiple of "
    "corrmatch's.",
    "per s": "elements in one call over the time of the forward.",
    "peak": "memory in use during a call above the level before it, the result included; MiB, for forward and, where "
    "there are two figures, forward + backward.",
    "error": "against corrmatch.reference in float64: relative Frobenius norm, the largest of result and gradients; "
    "for masks, labels and components the share of pixels that differ. What fails is not timed.",
}

UNCERTAIN = "peers that start many small parallel steps suffer most from that. --threads 1 is steadier."


def header(environment: dict[str, Any], options: argparse.Namespace) -> str:
    """The environment, and an explanation of the tables."""
    backends = "; ".join(f"{name}: {detail}" for name, detail in environment["backends"].items() if name != "reference")
    commit = "not in a checkout" if environment["commit"] is None else f"commit {environment['commit']}"
    load = environment["load"]
    facts = {
        "device": f"{environment['device']}, {threads(environment)}, {environment['platform']}",
        "backends": backends,
        "versions": f"corrmatch {environment['corrmatch']} ({commit}), torch {environment['torch']}, "
        f"Python {environment['python']}",
        "date": environment["date"],
        "inputs": f"{options.dtype}, random; gradients of query, key{' and value' if options.value_grad else ''}",
    }
    if load is not None and load > 0.5 * environment["threads"]:
        facts["load"] = f"{load:.1f} at the start: other processes run on this machine, and {UNCERTAIN}"
    lines = ["corrmatch benchmark"]
    for term, text in [*facts.items(), ("", ""), *LEGEND.items()]:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {term:<10}", subsequent_indent=" " * 12) or [""]
    return "\n".join([*lines, ""])


def threads(environment: dict[str, Any]) -> str:
    """The number of CPU threads, as text."""
    return "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"


def passes_of(*rows: dict[str, Any]) -> tuple[str, ...]:
    """The passes of a table. Backward passes are shown if a contender has been timed with them."""
    return tuple(PASSES) if any("both" in row["times"] for row in rows) else ("forward",)


def op_header(op: str, title: str, passes: tuple[str, ...]) -> str:
    """Title and column heads of an op."""
    top, heads = " " * NAME, " " * NAME
    for name in passes:
        top += f"  {PASSES[name] if len(passes) > 1 else '':>18}"
        heads += f"  {'ms':>11} {'ratio':>6}"
    mebibytes = 14 if len(passes) > 1 else 11
    top = f"{top}{'':>9}{'peak extra':>{mebibytes}}"
    heads = f"{heads}{'per s':>9}{'MiB':>{mebibytes}}{'error':>8}"
    return "\n".join([f"{op}: {title}", "=" * WIDTH, top, heads])


def block(result: dict[str, Any]) -> str:
    """One row for each contender of a case, and one for its CUDA graphs."""
    lines = [f"{result['size']} ({result['workload']}; {_si(result['elements'])} {result['unit']})"]
    timed = [row for row in result["contenders"] if row["status"] == "ok"]
    passes = passes_of(*timed)
    for row in result["contenders"]:
        name = f"{row['name']:<{NAME - 2}}"
        if row["status"] == "ok":
            lines.append(_row(row, timed, passes, result["elements"]))
            if "forward_graph" in row["times"]:
                lines.append(_times("    in a CUDA graph", row, timed, [f"{p}_graph" for p in passes]))
            elif "no_graph" in row:
                lines.append(f"    no CUDA graph: {row['no_graph']}"[:WIDTH])
        elif row["status"] == "wrong":
            lines.append(f"! {name}   WRONG, not timed: error {row['error']:.1e}, bound {result['tolerance']:.0e}")
        elif row["status"] == "failed":
            lines.append(f"! {name}   FAILED, not timed: {row['reason']}"[:WIDTH])
        elif row["status"] in ("not installed", "untimed"):
            lines.append(f"  {name}   {row['status']}")
    lines += [floor_line(row) for row in timed if row["ours"]]
    return "\n".join([*(line for line in lines if line), ""])


def add_floor_shares(result: dict[str, Any], exponentials_a_second: float | None) -> None:
    """Adds to each timed contender the least time of the exponentials as a share of its time."""
    for row in result["contenders"]:
        if row["status"] == "ok":
            row["floor_shares"] = {
                timed: count / exponentials_a_second / row["times"][timed]["median"]
                for name, count in result["exponentials"].items()
                for timed in (name, f"{name}_graph")
                if exponentials_a_second is not None and timed in row["times"]
            }


def floor_line(row: dict[str, Any]) -> str:
    """Shares of the exp floor, as text."""
    shares = [
        f"{PASSES[name.removesuffix('_graph')]}{' in a graph' if name.endswith('_graph') else ''} {100 * share:.0f} %"
        for name, share in row["floor_shares"].items()
    ]
    return f"    share of the exp floor: {', '.join(shares)}" if shares else ""


def _row(row: dict[str, Any], timed: list[dict[str, Any]], passes: tuple[str, ...], elements: int) -> str:
    line = _times(f"{'▸' if row['ours'] else ' '} {row['name']:<{NAME - 2}}", row, timed, passes)
    peak = row["peak_extra_bytes"]
    width = 7 if len(passes) > 1 else 11
    weighed = [name for name in passes if name != "backward"]
    line += f"{_si(elements / row['times']['forward']['median']):>9}"
    line += "".join(f"{_mebibytes(peak[name]) if name in peak else '—':>{width}}" for name in weighed)
    return line + (f"{row['error']:>8.0e}" if row["error"] > 0 else f"{'0':>8}")


def _times(head: str, row: dict[str, Any], timed: list[dict[str, Any]], passes: Sequence[str]) -> str:
    line = f"{head:<{NAME}}"
    for name in passes:
        time = row["times"].get(name)
        if time is None:
            line += f"  {'—':>11} {'—':>6}"
            continue
        spread = f"±{min(99, 100 * time['spread']):.0f}%"
        line += f"  {_milliseconds(time['median']):>6} {spread:>4} {ratio(row, timed, name):>6}"
    return line


def ratio(row: dict[str, Any], timed: list[dict[str, Any]], name: str) -> str:
    """The speedup of corrmatch: over the fastest peer in its own row, over the peer in the row of a peer."""
    ours = [r["times"][name]["median"] for r in timed if r["ours"] and name in r["times"]]
    peers = [r["times"][name]["median"] for r in timed if not r["ours"] and name in r["times"]]
    if not ours or not peers:
        return "—"
    ratio = (min(peers) if row["ours"] else row["times"][name]["median"]) / ours[0]
    shown = f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"
    return f"{shown}x" if row["ours"] else f"{shown} "


def footer(
    notes: list[str],
    failures: int,
    elapsed: float,
    environment: dict[str, Any],
) -> str:
    """The notes of the measured ops, and the verdict."""
    notes = [*notes]
    after = environment["load_after"]
    if after is not None and after > environment["threads"] + 0.7:
        notes.append(f"Load {after:.1f} at the end: other processes ran meanwhile, and {UNCERTAIN}")
    verdict = (
        "All agree with the oracle." if failures == 0 else f"{failures} FAILED: an error, wrong, or without an oracle."
    )
    notes.append(f"{verdict} {elapsed:.0f} s in all.")
    return "\n".join(textwrap.fill(note, WIDTH) for note in notes)


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def _mebibytes(count: int | None) -> str:
    if count is None:
        return "n/a"
    mebibytes = count / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.1f}" if mebibytes >= 0.1 else "<0.1"


def _si(x: float) -> str:
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if x >= 10**power:
            return f"{x / 10**power:.3g} {prefix}"
    return f"{x:.3g}"
