"""Measures the effect of region propagation on pseudo-labels of a trained network, under combinations of settings.

    python benchmarks/region_study.py CHECKPOINT KEY=VALUE,VALUE... [KEY=VALUE...] --out FILE.json

labels unlabelled images whose masks are available, once for each combination of the values, and prints a line for each:
coverage and precision of the pseudo-labels before and after region propagation, the precision of added and of changed
pixels, and the precision of their own labels before. Nothing is trained. The network needs a correlation head.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from harness.machine import environment

from corrmatch.data.datasets import find_data
from corrmatch.methods import build_method
from corrmatch.training import checkpoint
from corrmatch.training.diagnostics import choose, count, rates
from corrmatch.training.predict import load_model

COLUMNS = (
    "coverage", "precision", "after_coverage", "after_precision", "added", "added_precision", "added_precision_own",
    "changed", "changed_precision", "changed_precision_own", "purity", "area", "support_share",
)  # fmt: skip


def combinations(settings: list[str]) -> list[list[str]]:
    """The overrides of each combination. `a=1,2 b=3` has the combinations a=1 b=3 and a=2 b=3."""
    pairs = [setting.split("=", 1) for setting in settings]
    return [
        [f"{key}={value}" for (key, _), value in zip(pairs, values, strict=True)]
        for values in itertools.product(*(value.split(",") for _, value in pairs))
    ]


def measure(path: Path, overrides: list[str]) -> dict[str, float]:
    """The rates of `eval.pseudo_labels` for the network of a checkpoint, used as in FixMatch."""
    network, _, classes = load_model(path)
    config = checkpoint.config_of(checkpoint.load(path), ["method=fixmatch", "propagation.head=true", *overrides])
    data = find_data(config.data)
    method = build_method(config, len(classes), pretrained=False, init=network.state_dict())
    return rates(count(method, choose(data), data, config, torch.device("cpu")), classes)


def main() -> None:
    """Measures all combinations, prints them and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE,VALUE")
    parser.add_argument("--out", type=Path, help="JSON, with everything that was counted")
    options = parser.parse_args()
    found = []
    print("per cent:", ", ".join(COLUMNS))
    for overrides in combinations(options.settings):
        shares = measure(options.checkpoint, overrides)
        found.append({"settings": overrides, **shares})
        print(*(f"{100 * shares[name]:5.1f}" for name in COLUMNS), " ", *overrides, flush=True)
    if options.out is not None:
        content = {"checkpoint": f"{options.checkpoint.parent.name}/{options.checkpoint.name}"}
        options.out.write_text(
            json.dumps(content | {"environment": environment("cpu"), "results": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
