"""Reads the logs of several runs, and groups the runs of the same setting into rows."""

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

Line = dict[str, Any]  # one line of scalars.jsonl
SAME = {*FREE, "train.seed"} - {"data.root"}  # keys that may differ within a row
SPLIT = {"data.labeled", "data.unlabeled"}  # these too, if the number of labelled images is the same


class Spread(NamedTuple):
    """Mean and sample standard deviation over runs; NaN where there are too few runs."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Computes both without NaNs, which stand for classes that do not occur."""
        known = [value for value in values if not math.isnan(value)]
        deviation = statistics.stdev(known) if len(known) > 1 else math.nan
        return cls(statistics.fmean(known) if known else math.nan, deviation)


@dataclass(frozen=True)
class Run:
    """The configuration and the log of one work directory."""

    folder: Path
    config: dict[str, Any]  # dotted keys
    lines: dict[str, list[Line]]  # of scalars.jsonl by kind: train, val, ...
    snapshot: Snapshot | None

    @property
    def last(self) -> Line:
        """The line of the last evaluation."""
        return self.lines["val"][-1]

    @property
    def best(self) -> Line:
        """The line of the evaluation with the highest mean IoU; the first one in case of a tie."""
        return max(self.lines["val"], key=lambda line: -1 if math.isnan(line["miou"]) else line["miou"])

    @property
    def setting(self) -> dict[str, Any]:
        """The settings that all runs of a row share."""
        free = SAME if self.snapshot is None else SAME | SPLIT
        counts = (
            {} if self.snapshot is None else {"labelled": self.snapshot.labeled, "unlabelled": self.snapshot.unlabeled}
        )
        return {key: value for key, value in self.config.items() if key not in free} | counts


@dataclass(frozen=True)
class Row:
    """The runs of one setting."""

    index: int
    runs: list[Run]
    name: str

    @property
    def letter(self) -> str:
        """A, B, ...: a short name for charts."""
        return string.ascii_uppercase[self.index] if self.index < 26 else str(self.index + 1)

    @property
    def setting(self) -> dict[str, Any]:
        """The settings that its runs share."""
        return self.runs[0].setting

    def spread(self, value: Callable[[Run], float]) -> Spread:
        """The spread of a number over the runs."""
        return Spread.of(value(run) for run in self.runs)

    def last(self, name: str, kind: str = "val") -> Spread:
        """The spread of a scalar in the last line of a kind."""
        return self.spread(lambda run: run.lines[kind][-1].get(name, math.nan) if run.lines.get(kind) else math.nan)

    def names(self, kind: str) -> Iterator[str]:
        """The names of the scalars of a kind, in the order of the log."""
        lines = (line for run in self.runs for line in run.lines.get(kind, []))
        return iter(dict.fromkeys(name for line in lines for name in line if name not in ("step", "kind")))

    def over_steps(self, kind: str, name: str) -> dict[int, list[float]]:
        """The values of a scalar in all runs, by step: only steps that all runs have logged, and finite values."""
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
    """Reads a work directory. Raises ConfigError if it is not one, or has no evaluation yet."""
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
            return  # the last line may be incomplete if the run was stopped or is still running


def _leaves(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in part.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def group(runs: Sequence[Run]) -> list[Row]:
    """Groups runs into rows, in the given order. A row is named after the settings that distinguish it."""
    settings: list[dict[str, Any]] = []
    members: list[list[Run]] = []
    for run in runs:
        if run.setting not in settings:
            settings.append(run.setting)
            members.append([])
        members[settings.index(run.setting)].append(run)
    return [Row(i, members[i], name) for i, name in enumerate(_names(settings))]


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values differ between settings."""
    found = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in found if any(s[key] != t[key] for s in settings for t in settings if key in s and key in t)]


def _names(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The method and the differing keys that are not null: `corrmatch, regions=false`."""
    others = [key for key in differing(settings) if key != "method"]
    parts = [
        [f"{key.rpartition('.')[2]}={short(s[key])}" for key in others if s.get(key) is not None] for s in settings
    ]
    return [", ".join([str(s["method"]), *more]) for s, more in zip(settings, parts, strict=True)]


def short(value: Any) -> str:
    """A value in YAML."""
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """Reads runs and groups them into rows."""
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: given more than once")
    return group([read_run(folder) for folder in folders])
