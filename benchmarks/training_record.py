"""Collects the results of training runs in a JSON file, and prints a table of the gains of their methods.

    python benchmarks/training_record.py FILE.json runs/a runs/b ...

adds the runs to the file, or replaces runs of the same name, and prints the table. Without runs it prints the table.
A row has the runs of one setting with all their seeds. Its gain is the share of the headroom that it closes,
(row - labelled alone) / (all labelled - labelled alone). `labelled alone` are the supervised runs with as many labelled
images, `all labelled` those with the most. Both have as many steps as the row, including those of the run that
`model.init` names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness.machine import environment

from corrmatch.config import load_config
from corrmatch.training.compare import Spread, dotted, read_run

BASE = "camvid_cpu"
HIDDEN = {  # keys that do not affect results, and the seed
    "data.root", "data.check", "work_dir", "train.seed", "train.workers", "train.save_every", "train.log_every",
    "model.pretrained", "eval.pseudo_labels",
}  # fmt: skip
Row = tuple[dict[str, Any], list[dict[str, Any]]]  # the common setting, and the runs


def record(folder: Path) -> dict[str, Any]:
    """A run: its differences from the shipped configuration, and its evaluations in per cent."""
    run = read_run(folder)
    if run.snapshot is None:
        raise SystemExit(f"{folder}: there is no evaluation to read the number of images from")
    steps, init = run.last["step"], run.config["model.init"]
    if init is not None:  # the steps of the first run count, too
        steps += read_run(Path(init).parent).last["step"]
        run.config["model.init"] = Path(init).parent.name
    plain = dotted(load_config(BASE, ["data.root=.", f"method={run.config['method']}"]))
    return {
        "name": folder.name,
        "seed": run.config["train.seed"],
        "labelled": run.snapshot.labeled,
        "unlabelled": run.snapshot.unlabeled,
        "steps": steps,
        "method": run.config["method"],
        "keys": {k: v for k, v in run.config.items() if plain.get(k) != v and k not in HIDDEN},
        "miou": {line["step"]: round(100 * line["miou"], 2) for line in run.lines["val"]},
        "iou": {k[4:]: round(100 * v, 2) for k, v in run.last.items() if k.startswith("iou_")},
        "pseudo_labels": run.lines.get("pseudo_labels", [])[-1:],
    }


def rows(runs: list[dict[str, Any]]) -> list[Row]:
    """The runs of one setting together, in the order of the file."""
    found: list[Row] = []
    for run in runs:
        setting = {name: run[name] for name in ("method", "labelled", "steps")}
        setting["keys"] = {k: v for k, v in run["keys"].items() if k not in HIDDEN}
        for known, members in found:
            if known == setting:
                members.append(run)
                break
        else:
            found.append((setting, [run]))
    return found


def last(row: Row) -> Spread:
    """Mean IoU of the last evaluation."""
    return Spread.of(list(run["miou"].values())[-1] for run in row[1])


def gain(row: Row, table: list[Row]) -> float | None:
    """The share of the headroom that a row closes; None if the runs for comparison are missing."""
    plain = [r for r in table if r[0]["method"] == "supervised" and r[0]["steps"] == row[0]["steps"]]
    low = [r for r in plain if r[0]["labelled"] == row[0]["labelled"]]
    high = max(plain, key=lambda r: r[0]["labelled"], default=None)
    if row in plain or not low or high is None or high is low[0]:
        return None
    return (last(row).mean - last(low[0]).mean) / (last(high).mean - last(low[0]).mean)


def show(spread: Spread, runs: int) -> str:
    """The mean and, with several runs, the deviation."""
    return f"{spread.mean:.1f} ± {spread.deviation:.1f}" if runs > 1 else f"{spread.mean:.1f}"


def line(row: Row, table: list[Row]) -> str:
    """One row in Markdown."""
    setting, runs = row
    keys = {k: v for k, v in setting["keys"].items() if not k.startswith("data.")}
    name = " ".join([setting["method"], *(f"{k}={json.dumps(v)}".replace('"', "") for k, v in keys.items())])
    best = Spread.of(max(run["miou"].values()) for run in runs)
    share = gain(row, table)
    cells = (name, setting["labelled"], setting["steps"], len(runs), show(last(row), len(runs)), show(best, len(runs)),
             "" if share is None else f"{share:.2f}")  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Adds runs to the file, and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", nargs="*", type=Path)
    arguments = parser.parse_args()
    content = json.loads(arguments.file.read_text()) if arguments.file.exists() else {"base": BASE, "runs": []}
    if arguments.runs:
        new = [record(folder) | {"environment": environment("cpu")} for folder in arguments.runs]
        names = {run["name"] for run in new}
        content["runs"] = [run for run in content["runs"] if run["name"] not in names] + new
        content = json.loads(json.dumps(content))  # steps are text in what is read back
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_text(json.dumps(content, indent=1) + "\n")
    table = rows(content["runs"])
    print(
        "| method and keys | labelled | steps | runs | last | best | gain |", "|---|---|---|---|---|---|---|", sep="\n"
    )
    for row in table:
        print(line(row, table))


if __name__ == "__main__":
    main()
