"""What several runs came to: their logs read, and the runs of one setting put into one row."""

from __future__ import annotations

import json
import math
import statistics
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from corrmatch.config import Config, ConfigError, load_config, to_yaml
from corrmatch.training import snapshot
from corrmatch.training.checkpoint import FREE
from corrmatch.training.snapshot import Snapshot

Line = dict[str, Any]  # of scalars.jsonl
SAME = {*FREE, "train.seed"} - {"data.root"}  # keys in which the runs of a row may differ
SPLIT = {"data.labeled", "data.unlabeled"}  # and so may these, where as many images are labelled


class Spread(NamedTuple):
    """Of a number over runs: mean and sample standard deviation, NaN where there are too few."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """NaNs, of classes that do not occur, are left out."""
        known = [value for value in values if not math.isnan(value)]
        deviation = statistics.stdev(known) if len(known) > 1 else math.nan
        return cls(statistics.fmean(known) if known else math.nan, deviation)


@dataclass(frozen=True)
class Run:
    """What a work directory says."""

    folder: Path
    config: dict[str, Any]  # dotted keys
    lines: dict[str, list[Line]]  # of scalars.jsonl by kind: train, val, ...
    snapshot: Snapshot | None

    @property
    def last(self) -> Line:
        """The last evaluation."""
        return self.lines["val"][-1]

    @property
    def best(self) -> Line:
        """The evaluation of the highest mean IoU, the first of them."""
        return max(self.lines["val"], key=lambda line: -1 if math.isnan(line["miou"]) else line["miou"])

    @property
    def setting(self) -> dict[str, Any]:
        """All that another run must share to be in one row with this one."""
        free = SAME if self.snapshot is None else SAME | SPLIT
        counts = (
            {} if self.snapshot is None else {"labelled": self.snapshot.labeled, "unlabelled": self.snapshot.unlabeled}
        )
        return {key: value for key, value in self.config.items() if key not in free} | counts


@dataclass(frozen=True)
class Row:
    """Runs of one setting."""

    index: int
    runs: list[Run]
    name: str

    @property
    def letter(self) -> str:
        """A, B, ...: short for the name."""
        return string.ascii_uppercase[self.index] if self.index < 26 else str(self.index + 1)

    @property
    def setting(self) -> dict[str, Any]:
        """What its runs share."""
        return self.runs[0].setting

    def spread(self, value: Callable[[Run], float]) -> Spread:
        """Of a number of each run."""
        return Spread.of(value(run) for run in self.runs)

    def last(self, name: str, kind: str = "val") -> Spread:
        """Of a scalar in the last line of a kind."""
        return self.spread(lambda run: run.lines[kind][-1].get(name, math.nan) if run.lines.get(kind) else math.nan)

    def names(self, kind: str) -> Iterator[str]:
        """The scalars of a kind, in the order of the log."""
        lines = (line for run in self.runs for line in run.lines.get(kind, []))
        return iter(dict.fromkeys(name for line in lines for name in line if name not in ("step", "kind")))

    def over_steps(self, kind: str, name: str) -> dict[int, list[float]]:
        """A scalar of all runs at each step that all of them have logged; what is not finite is left out."""
        logged = [
            {line["step"]: line[name] for line in run.lines.get(kind, []) if math.isfinite(line.get(name, math.nan))}
            for run in self.runs
        ]
        common = sorted(set.intersection(*(set(values) for values in logged)))
        return {step: [values[step] for values in logged] for step in common}

    @property
    def confusion(self) -> np.ndarray | None:
        """(C, C), summed over the runs whose evaluation was kept: truth in rows."""
        kept = [np.array(run.snapshot.confusion) for run in self.runs if run.snapshot is not None]
        return sum(kept[1:], kept[0]) if kept else None


def read_run(folder: Path) -> Run:
    """Reads a work directory; ConfigError where it is none, or no evaluation has been made in it yet."""
    for name in ("config.yaml", "scalars.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: expected the work directory of a run, there is no {name}")
    lines: dict[str, list[Line]] = {}
    for line in _lines(folder / "scalars.jsonl"):
        lines.setdefault(line["kind"], []).append(line)
    if "val" not in lines:
        raise ConfigError(f"{folder}: no evaluation has been made in this run yet")
    return Run(folder, dotted(load_config(str(folder / "config.yaml"))), lines, snapshot.read(folder))


def dotted(config: Config) -> dict[str, Any]:
    """The keys of a configuration and their values: `train.lr: 0.001`."""
    return dict(_leaves(yaml.safe_load(to_yaml(config))))


def _lines(path: Path) -> Iterator[Line]:
    rows = path.read_text().splitlines()
    for i, row in enumerate(rows, start=1):
        try:
            yield json.loads(row)
        except ValueError as error:
            if i < len(rows):
                raise ConfigError(f"{path}: line {i} is not JSON") from error
            return  # a run that is stopped, or still running, may have written half of its last line


def _leaves(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in part.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def group(runs: Sequence[Run]) -> list[Row]:
    """The runs in rows, in the order in which they are given. What tells the rows apart is their name."""
    settings: list[dict[str, Any]] = []
    members: list[list[Run]] = []
    for run in runs:
        if run.setting not in settings:
            settings.append(run.setting)
            members.append([])
        members[settings.index(run.setting)].append(run)
    return [Row(i, members[i], name) for i, name in enumerate(_names(settings))]


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys that have several values among the settings that have them."""
    found = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in found if any(s[key] != t[key] for s in settings for t in settings if key in s and key in t)]


def _names(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The method, and the other keys that differ, where they are not null: `corrmatch, regions=false`."""
    others = [key for key in differing(settings) if key != "method"]
    parts = [
        [f"{key.rpartition('.')[2]}={short(s[key])}" for key in others if s.get(key) is not None] for s in settings
    ]
    return [", ".join([str(s["method"]), *more]) for s, more in zip(settings, parts, strict=True)]


def short(value: Any) -> str:
    """A value as YAML has it."""
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """Reads runs and puts them into rows."""
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: given more than once")
    return group([read_run(folder) for folder in folders])
